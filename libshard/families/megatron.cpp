// Rows in the order in which Megatron registers the modules; optimizer states rely on that order.
// Sources: Megatron-Core's module tree and sharded_state_dict of GPTModel, 0.12 to 0.20.
#include "libshard/families/megatron.h"

#include "libshard/error.h"

namespace shard {
namespace {

struct Cutting {
  int dim = -1;
  Ways ways = Ways::None;
  int pieces = 1;
};
constexpr Cutting kWhole{};
constexpr Cutting kRows{0, Ways::Tensor, 1};
constexpr Cutting kColumns{1, Ways::Tensor, 1};

/// Adds rows below one prefix, whose logical names lie below another.
class Rows {
 public:
  Rows(std::vector<Row>& rows, std::string key, std::string logical, Stage stage, std::string only = "")
      : rows_(rows), key_(std::move(key)), logical_(std::move(logical)), only_(std::move(only)), stage_(stage) {}

  void add(std::string dialects, const std::string& key, std::string dims, std::vector<Part> parts, Cutting cut = kWhole,
           std::string when = "") {
    if (!only_.empty()) std::erase_if(dialects, [&](char c) { return only_.find(c) == only_.npos; });
    if (dialects.empty()) return;
    for (auto& part : parts) part.name = logical_ + part.name;
    rows_.push_back({std::move(dialects), key_ + key, std::move(dims), std::move(parts), cut.dim, cut.ways, cut.pieces,
                     stage_, std::move(when), false, false});
  }
  void one(std::string dialects, const std::string& key, std::string dims, const std::string& logical, Cutting cut = kWhole,
           std::string when = "") {
    add(std::move(dialects), key, std::move(dims), {{logical, -1, "", "", {}}}, cut, std::move(when));
  }
  void norm(const std::string& dialects, const std::string& key, const std::string& logical, const std::string& when = "") {
    const bool fused = key.ends_with("layer_norm");
    one(dialects, key + (fused ? "_weight" : ".weight"), "hidden", logical + ".weight", kWhole, when);
    one(dialects, key + (fused ? "_bias" : ".bias"), "hidden", logical + ".bias", kWhole, when + " layernorm");
  }

  /// fc1 holds [gate|up], or only up where there is no gate.
  void fc1(const std::string& dialects, const std::string& key, const std::string& logical, const std::string& ffn, Ways ways,
           const std::string& when, const std::string& number = "") {
    for (const auto& [suffix, tail, biased] :
         {std::tuple{"weight", " | hidden", ""}, std::tuple{"bias", "", " mlp_bias"}}) {
      const auto gate = logical + "gate." + suffix, up = logical + "up." + suffix;
      add(dialects, key + suffix + number, "2 " + ffn + tail, {{gate, 0, "0", "1", {}}, {up, 0, "1", "1", {}}}, {0, ways, 2},
          when + " gated" + biased);
      one(dialects, key + suffix + number, ffn + tail, up, {0, ways, 1}, when + " !gated" + biased);
    }
  }
  void fc2(const std::string& dialects, const std::string& key, const std::string& logical, const std::string& ffn, Ways ways,
           const std::string& when, const std::string& number = "") {
    one(dialects, key + "weight" + number, "hidden | " + ffn, logical + "down.weight", {1, ways, 1}, when);
    one(dialects, key + "bias" + number, "hidden", logical + "down.bias", kWhole, when + " mlp_bias");
  }
  /// The two halves of fc1 under keys of their own (singleton_local_shards); the "1" is the place of the half, as parts of fc1 keep it.
  void singleton(const std::string& key, const std::string& logical, const std::string& ffn, Ways ways, const std::string& when) {
    one("d", key + "weight_w", "1 " + ffn + " | hidden", logical + "gate.weight", {0, ways, 1}, when + " gated");
    one("d", key + "weight_v", "1 " + ffn + " | hidden", logical + "up.weight", {0, ways, 1}, when + " gated");
    one("d", key + "bias_w", "1 " + ffn, logical + "gate.bias", {0, ways, 1}, when + " gated mlp_bias");
    one("d", key + "bias_v", "1 " + ffn, logical + "up.bias", {0, ways, 1}, when + " gated mlp_bias");
  }

 private:
  std::vector<Row>& rows_;
  std::string key_, logical_, only_;
  Stage stage_;
};

void attention(Rows& rows) {
  const std::string qkv = "self_attention.linear_qkv.";
  rows.one("dlt", "self_attention.linear_proj.weight", "hidden | heads value_head", "attention.out.weight", kColumns);
  rows.one("dlt", "self_attention.linear_proj.bias", "hidden", "attention.out.bias", kWhole, "mlp_bias");
  for (const auto& [suffix, tail, biased] : {std::tuple{"weight", " | hidden", ""}, std::tuple{"bias", "", " qkv_bias"}}) {
    const auto name = [end = std::string(suffix)](const char* which) { return std::string("attention.") + which + "." + end; };
    rows.add("dlt", qkv + suffix, std::string("groups ratio+2 head") + tail,
             {{name("q"), 1, "0", "ratio", {}}, {name("k"), 1, "ratio", "1", {}}, {name("v"), 1, "ratio+1", "1", {}}}, kRows,
             std::string("!mla") + biased);
  }
  rows.norm("dt", "self_attention.linear_qkv.layer_norm", "attention.norm", "!mla");
  rows.one("dlt", "self_attention.q_layernorm.weight", "head", "attention.q_norm.weight", kWhole, "qk_norm !mla");
  rows.one("dlt", "self_attention.q_layernorm.bias", "head", "attention.q_norm.bias", kWhole, "qk_norm layernorm !mla");
  rows.one("dlt", "self_attention.k_layernorm.weight", "head", "attention.k_norm.weight", kWhole, "qk_norm !mla");
  rows.one("dlt", "self_attention.k_layernorm.bias", "head", "attention.k_norm.bias", kWhole, "qk_norm layernorm !mla");
  rows.one("dlt", "self_attention.core_attention.softmax_offset", "heads", "attention.sinks", kRows, "sinks");
}

/// Multi-latent attention. Both specs share the global shapes; only the local one cuts the down projections.
void latent_attention(Rows& rows) {
  const std::string a = "self_attention.";
  rows.one("dlt", a + "linear_q_proj.weight", "heads nope+rope_dim | hidden", "attention.q.weight", kRows, "mla !q_lora");
  rows.one("l", a + "linear_q_down_proj.weight", "q_lora | hidden", "attention.q_down.weight", kRows, "mla q_lora");
  rows.one("dt", a + "linear_q_down_proj.weight", "q_lora | hidden", "attention.q_down.weight", kWhole, "mla q_lora");
  rows.one("dlt", a + "linear_q_up_proj.weight", "heads nope+rope_dim | q_lora", "attention.q_up.weight", kRows, "mla q_lora");
  rows.one("l", a + "linear_kv_down_proj.weight", "kv_lora+rope_dim | hidden", "attention.kv_down.weight", kRows, "mla");
  rows.one("dt", a + "linear_kv_down_proj.weight", "kv_lora+rope_dim | hidden", "attention.kv_down.weight", kWhole, "mla");
  rows.one("dlt", a + "linear_kv_up_proj.weight", "heads nope+value_head | kv_lora", "attention.kv_up.weight", kRows, "mla");
  for (const auto& [part, layernorm] : {std::pair{"weight", ""}, std::pair{"bias", " layernorm"}}) {
    const auto norm = [&, end = std::string(part), more = std::string(layernorm)](const char* dialects, const std::string& key, const char* size,
                                                                                  const std::string& logical, const std::string& when) {
      rows.one(dialects, a + key + end, size, logical + end, kWhole, when + more);
    };
    norm("dt", "linear_q_up_proj.layer_norm_", "q_lora", "attention.q_norm.", "mla q_lora qk_norm");
    norm("dt", "linear_kv_up_proj.layer_norm_", "kv_lora", "attention.kv_norm.", "mla qk_norm");
    norm("dl", "q_layernorm.", "q_lora", "attention.q_norm.", "mla q_lora qk_norm");
    norm("dl", "kv_layernorm.", "kv_lora", "attention.kv_norm.", "mla qk_norm");
  }
}

/// Norms behind the sublayers, as Megatron-Bridge's Gemma layers name them.
void post_norms(Rows& rows) {
  rows.one("dlt", "self_attention.linear_proj.post_layernorm.weight", "hidden", "attention.post_norm.weight", kWhole, "post_norms");
  rows.one("dlt", "mlp.linear_fc2.post_layernorm.weight", "hidden", "mlp.post_norm.weight", kWhole, "post_norms");
}

void dense_mlp(Rows& rows) {
  rows.fc1("dlt", "mlp.linear_fc1.", "mlp.", "ffn", Ways::Tensor, "!moe");
  rows.norm("dt", "mlp.linear_fc1.layer_norm", "mlp.norm", "!moe");
  rows.fc2("dlt", "mlp.linear_fc2.", "mlp.", "ffn", Ways::Tensor, "!moe");
  rows.singleton("mlp.linear_fc1.", "mlp.", "ffn", Ways::Tensor, "!moe");
}

void mixture(Rows& rows) {
  rows.one("dlt", "mlp.router.weight", "experts | hidden", "mlp.router.weight", kWhole, "moe");
  rows.one("dlt", "mlp.router.bias", "experts", "mlp.router.bias", kWhole, "moe mlp_bias router_bias");
  rows.one("dlt", "mlp.router.expert_bias", "experts", "mlp.router.expert_bias", kWhole, "moe expert_bias");
  const std::string logical = "mlp.experts.{e}.";
  rows.fc1("d", "mlp.experts.experts.{e}.linear_fc1.", logical, "expert_ffn", Ways::ExpertTensor, "moe");
  rows.fc2("d", "mlp.experts.experts.{e}.linear_fc2.", logical, "expert_ffn", Ways::ExpertTensor, "moe");
  rows.singleton("mlp.experts.experts.{e}.linear_fc1.", logical, "expert_ffn", Ways::ExpertTensor, "moe");
  rows.fc1("l", "mlp.experts.local_experts.{e}.linear_fc1.", logical, "expert_ffn", Ways::ExpertTensor, "moe");
  rows.fc2("l", "mlp.experts.local_experts.{e}.linear_fc2.", logical, "expert_ffn", Ways::ExpertTensor, "moe");
  rows.fc1("t", "mlp.experts.linear_fc1.", logical, "expert_ffn", Ways::ExpertTensor, "moe", "{e}");
  rows.fc2("t", "mlp.experts.linear_fc2.", logical, "expert_ffn", Ways::ExpertTensor, "moe", "{e}");
  rows.fc1("dlt", "mlp.shared_experts.linear_fc1.", "mlp.shared.", "shared_ffn", Ways::Tensor, "moe shared_ffn");
  rows.fc2("dlt", "mlp.shared_experts.linear_fc2.", "mlp.shared.", "shared_ffn", Ways::Tensor, "moe shared_ffn");
  rows.singleton("mlp.shared_experts.linear_fc1.", "mlp.shared.", "shared_ffn", Ways::Tensor, "moe shared_ffn");
  rows.one("dlt", "mlp.shared_experts.gate_weight", "1 | hidden", "mlp.shared.gate_weight", kWhole, "moe shared_gate");
}

void layer(std::vector<Row>& all, const std::string& key, const std::string& logical, Stage stage, const std::string& only = "") {
  Rows rows(all, key, logical, stage, only);
  rows.norm("l", "input_layernorm", "attention.norm");
  rows.norm("dt", "input_layernorm", "attention.norm", "mla");
  attention(rows);
  latent_attention(rows);
  rows.norm("l", "pre_mlp_layernorm", "mlp.norm");
  rows.norm("dt", "pre_mlp_layernorm", "mlp.norm", "moe");
  post_norms(rows);
  dense_mlp(rows);
  rows.norm("d", "mlp.linear_fc1.layer_norm", "mlp.norm", "moe");  // the local spec's spelling in torch_dist
  rows.norm("d", "pre_mlp_layernorm", "mlp.norm", "!moe");         // MLA's
  mixture(rows);
}

void mtp(std::vector<Row>& all, const std::string& inner, const std::string& only) {
  layer(all, "mtp.layers.{k}." + inner + ".", "mtp.{k}.layer.", Stage::Mtp, only);
}

}  // namespace

std::vector<Row> megatron_rows() {
  std::vector<Row> all;
  Rows(all, "embedding.", "embedding.", Stage::Embedding).one("dlt", "word_embeddings.weight", "vocab | hidden", "word.weight", kRows);
  all.back().vocabulary = true;
  Rows(all, "embedding.", "embedding.", Stage::Embedding)
      .one("dlt", "position_embeddings.weight", "positions | hidden", "position.weight", kWhole, "learned_positions");
  layer(all, "decoder.layers.{l}.", "layers.{l}.", Stage::Layer);
  Rows(all, "decoder.", "", Stage::FinalNorm).norm("dlt", "final_layernorm", "final_norm");
  Rows depth(all, "mtp.layers.{k}.", "mtp.{k}.", Stage::Mtp);
  depth.norm("dlt", "enorm", "enorm", "mtp");
  depth.norm("dlt", "hnorm", "hnorm", "mtp");
  depth.one("dlt", "eh_proj.weight", "hidden | 2 hidden", "eh_proj.weight", kRows, "mtp");
  mtp(all, "mtp_model_layer", "lt");
  mtp(all, "transformer_layer", "dlt");
  Rows(all, "mtp.layers.{k}.", "mtp.{k}.", Stage::Mtp).norm("dlt", "final_layernorm", "final_norm", "mtp");
  Rows(all, "output_layer.", "output.", Stage::Output).one("dlt", "weight", "vocab | hidden", "weight", kRows, "!tied");
  all.back().vocabulary = true;
  return all;
}

void complete(Params& params) {
  const auto has = [&](const char* key) { return params.contains(key); };
  if (!has("groups") && has("heads")) params["groups"] = params["heads"];
  if (has("heads") && has("groups") && params["groups"] > 0) {
    const auto heads = params["heads"], groups = params["groups"];
    require(heads > 0 && heads % groups == 0, Code::Mismatch,
            [&] { return fmt::format("model: {} attention heads in {} query groups; should divide evenly", heads, groups); });
    params["ratio"] = heads / groups;
  }
  if (!has("head") && has("hidden") && has("heads") && params["heads"] > 0) params["head"] = params["hidden"] / params["heads"];
  if (!has("value_head") && has("head")) params["value_head"] = params["head"];
  if (!has("expert_ffn") && has("ffn")) params["expert_ffn"] = params["ffn"];
}

void check_tensor_parallel(const Params& params, Index tp, Index etp) {
  const auto size = [&](const char* key) {
    const auto found = params.find(key);
    return found == params.end() ? 0 : found->second;
  };
  const auto divides = [&](const char* key, const char* what, Index ways, const char* whose) {
    require(size(key) % ways == 0, Code::BadLayout,
            [&] { return fmt::format("layout: {} {} cannot be divided by {} {}", size(key), what, whose, ways); });
  };
  divides("heads", "attention heads", tp, "tensor parallel size");
  if (const auto groups = size("groups"); groups > 0 && size("mla") == 0)
    require(groups % tp == 0 || tp % groups == 0, Code::BadLayout, [&] {
      return fmt::format("layout: {} query groups and tensor parallel size {}: one should divide the other", groups, tp);
    });
  divides("ffn", "feed-forward rows", tp, "tensor parallel size");
  divides("shared_ffn", "shared expert rows", tp, "tensor parallel size");
  if (size("experts") > 0) divides("expert_ffn", "expert feed-forward rows", etp, "expert tensor parallel size");
  if (size("mtp") > 0) divides("hidden", "hidden rows", tp, "tensor parallel size");
}

Side side_of(const Row& row, const Parallel& parallel, const Cell& cell) {
  if (row.cut < 0) return {};
  if (row.ways == Ways::ExpertTensor) return {row.cut, parallel.etp, cell.expert_tensor};
  return {row.cut, parallel.tp, cell.tensor};
}

bool has_extra_state(std::string_view module) {
  const auto last = module.substr(module.rfind('.') + 1);
  return last.starts_with("linear_") || last == "eh_proj";
}

}  // namespace shard
