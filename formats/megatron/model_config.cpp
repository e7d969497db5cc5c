// Argument names are those of Megatron-Core 0.12 to 0.20; what changes the forward pass and is not known here is refused.
#include "formats/megatron/model_config.h"

#include "libshard/error.h"

#include <cmath>

namespace formats::megatron {
namespace {

using pickle::Graph;
using pickle::Kind;
using pickle::Ref;
using shard::Activation;
using shard::Code;
using shard::Index;
using shard::RopeConfig;
using shard::RouterConfig;
using shard::TransformerConfig;

class Reader {
 public:
  Reader(const Graph& graph, Ref args) : graph_(graph), args_(graph, args) {}

  std::optional<double> real(const char* name) const {
    const auto found = args_.value(name);
    if (!found) return std::nullopt;
    const auto kind = graph_.kind(*found);
    shard::require(kind == Kind::Float || kind == Kind::Int || kind == Kind::Bool, Code::BadFormat, [&] { return fmt::format("args.{}: is no number", name); });
    return graph_.real(*found);
  }
  double real(const char* name, double otherwise) const { return real(name).value_or(otherwise); }
  Index integer(const char* name, Index otherwise) const {
    const auto value = real(name);
    shard::require(!value || (*value == std::floor(*value) && std::abs(*value) < 9e15), Code::BadFormat, [&] { return fmt::format("args.{}: is {}; should be an integer", name, *value); });
    return value ? *args_.integer(name) : otherwise;
  }
  bool flag(const char* name) const { return real(name).value_or(0) != 0; }
  std::string text(const char* name, const char* otherwise) const {
    if (const auto found = args_.value(name)) {
      const auto kind = graph_.kind(*found);
      shard::require(kind != Kind::Float && kind != Kind::Int && kind != Kind::Bool, Code::BadFormat, [&] { return fmt::format("args.{}: is a number; should be a name", name); });
    }
    return args_.text(name).value_or(otherwise);
  }
  bool set(const char* name) const { return args_.flag(name) || !args_.text(name).value_or("").empty(); }
  bool has(const char* name) const { return args_.value(name).has_value(); }
  Index needed(const char* name) const {
    const auto value = args_.integer(name);
    shard::require(value && *value > 0, Code::Mismatch, [&] { return fmt::format("args.{}: is not there; a forward pass needs it", name); });
    return *value;
  }
  /// An integer N or a list with one entry a layer.
  std::optional<std::vector<Index>> list(const char* name) const {
    const auto found = args_.value(name);
    if (!found || (graph_.kind(*found) != Kind::List && graph_.kind(*found) != Kind::Tuple)) return std::nullopt;
    std::vector<Index> out;
    for (const auto item : graph_.items(*found)) {
      shard::require(graph_.kind(item) == Kind::Int || graph_.kind(item) == Kind::Bool, Code::BadFormat,
                     [&] { return fmt::format("args.{}: holds something else than integers", name); });
      out.push_back(graph_.integer(item));
    }
    return out;
  }
  void refuse(const char* name) const {
    if (flag(name)) shard::fail(Code::BadFormat, "args.{}: is set; this forward pass does not know it", name);
  }
  void refuse_value(const char* name, const char* known) const {
    const auto value = text(name, known);
    if (value != known) shard::fail(Code::BadFormat, "args.{}: is '{}'; this forward pass knows '{}'", name, value, known);
  }

 private:
  const Graph& graph_;
  Args args_;
};

double concentration(double scale, double mscale) { return scale <= 1 ? 1 : 0.1 * mscale * std::log(scale) + 1; }

/// One flag a layer, from None, an integer or a list.
template <typename Rule>
std::vector<bool> per_layer(const Reader& args, const char* name, Index layers, bool otherwise, Rule&& rule) {
  std::vector<bool> out(static_cast<std::size_t>(layers), otherwise);
  if (const auto list = args.list(name)) {
    shard::require(static_cast<Index>(list->size()) == layers, Code::Mismatch,
                   [&] { return fmt::format("args.{}: has {} entries for {} layers", name, list->size(), layers); });
    for (std::size_t i = 0; i < out.size(); ++i) out[i] = (*list)[i] != 0;
  } else if (args.has(name) && args.integer(name, 0) > 0) {
    for (Index i = 0; i < layers; ++i) out[static_cast<std::size_t>(i)] = rule(i, args.integer(name, 1));
  }
  return out;
}

void read_activation(const Reader& args, TransformerConfig& out) {
  out.glu_linear_offset = args.real("glu_linear_offset", 0);
  out.activation_clamp = args.real("activation_func_clamp_value");
  out.gated_linear_unit = true;
  if (args.flag("swiglu")) out.activation = Activation::Silu;
  else if (args.flag("quick_geglu")) out.activation = Activation::QuickGelu;
  else {
    out.gated_linear_unit = args.flag("gated_linear_unit");
    if (args.flag("squared_relu")) out.activation = Activation::SquaredRelu;
    else if (args.flag("openai_gelu")) {
      out.activation = Activation::GeluTanh;
      out.notes.push_back("args.openai_gelu is taken for the tanh form of GELU, which converted GPT-2 weights mean by it");
    } else {
      // Argument checks of Megatron turn the fusion, and with it the tanh form, off where linears have no bias.
      const bool fused = args.flag("bias_gelu_fusion") && args.flag("add_bias_linear");
      out.activation = fused ? Activation::GeluTanh : Activation::GeluErf;
    }
  }
}

RopeConfig read_rope(const Reader& args, const TransformerConfig& model, const std::string& positions) {
  RopeConfig out;
  out.base = args.real("rotary_base", 10000);
  const auto percent = args.real("rotary_percent", 1);
  const bool latent = model.multi_latent_attention;
  const auto kind = latent ? args.text("rope_type", "yarn") : positions;
  const auto lanes = latent ? model.qk_pos_emb_head_dim : model.kv_channels;
  out.dim = kind == "yarn" ? lanes : static_cast<Index>(static_cast<double>(lanes) * percent);
  out.interleaved = latent || args.flag("rotary_interleaved");
  if (kind == "learned_absolute" || kind == "none") return out;
  if (kind == "rope") {
    out.type = RopeConfig::Type::Default;
    if (args.flag("use_rope_scaling") && !latent) {
      out.type = RopeConfig::Type::Llama3;
      out.factor = args.real("rope_scaling_factor", 8);
    } else if (const auto factor = args.real("rotary_seq_len_interpolation_factor"); factor && *factor != 1) {
      out.type = RopeConfig::Type::Linear;
      out.factor = *factor;
    }
    return out;
  }
  shard::require(kind == "yarn", Code::BadFormat, [&] { return fmt::format("args.{}: is '{}'; rope, yarn, learned_absolute and none are known", latent ? "rope_type" : "position_embedding_type", kind); });
  out.type = RopeConfig::Type::Yarn;
  const auto either = [&](const char* name, const char* prefixed, double otherwise) { return args.real(prefixed).value_or(args.real(name, otherwise)); };
  out.factor = latent ? args.real("rotary_scaling_factor", 40) : either("rotary_scaling_factor", "yarn_rotary_scaling_factor", 1);
  out.original_max_position = either("original_max_position_embeddings", "yarn_original_max_position_embeddings", 4096);
  out.beta_fast = either("beta_fast", "yarn_beta_fast", 32);
  out.beta_slow = either("beta_slow", "yarn_beta_slow", 1);
  out.truncate = args.has("yarn_correction_range_round_to_int") ? args.flag("yarn_correction_range_round_to_int") : true;
  const auto mscale = either("mscale", "yarn_mscale", 1), all = either("mscale_all_dim", "yarn_mscale_all_dim", 0);
  out.concentration = concentration(out.factor, mscale) / concentration(out.factor, all);
  return out;
}

void read_router(const Reader& args, TransformerConfig& out) {
  auto& router = out.router;
  const auto score = args.text("moe_router_score_function", "softmax");
  if (score == "softmax") router.score = RouterConfig::Score::Softmax;
  else if (score == "sigmoid") router.score = RouterConfig::Score::Sigmoid;
  else if (score == "sqrtsoftplus") router.score = RouterConfig::Score::SqrtSoftplus;
  else shard::fail(Code::BadFormat, "args.moe_router_score_function: is '{}'; softmax, sigmoid and sqrtsoftplus are known", score);
  router.topk = args.integer("moe_router_topk", 2);
  router.pre_softmax = args.flag("moe_router_pre_softmax");
  router.renormalize = router.score != RouterConfig::Score::Softmax;
  router.scaling = args.real("moe_router_topk_scaling_factor", 0);
  if (router.scaling == 0) router.scaling = 1;
  router.group_topk = args.integer("moe_router_group_topk", 0);
  router.num_groups = router.group_topk ? args.integer("moe_router_num_groups", 0) : 0;
  if (router.group_topk) router.group_best = std::max<Index>(1, router.topk / router.group_topk);
  router.fp32 = args.text("moe_router_dtype", "") == "fp32" || args.text("moe_router_dtype", "") == "fp64";
  const auto balancing = args.text("moe_router_load_balancing_type", "aux_loss");
  if (balancing == "sinkhorn") shard::fail(Code::BadFormat, "args.moe_router_load_balancing_type: is 'sinkhorn', which routes by the whole batch; this forward pass does not know it");
  if (args.real("moe_expert_capacity_factor")) shard::fail(Code::BadFormat, "args.moe_expert_capacity_factor: drops tokens; this forward pass does not");
  if (args.integer("moe_latent_size", 0)) shard::fail(Code::BadFormat, "args.moe_latent_size: is set; this forward pass does not know latent experts");
  out.moe_probs_on_input = args.flag("moe_apply_probs_on_input");
}

}  // namespace

TransformerConfig model_config(const Graph& graph, Ref ref, const shard::Params& params, std::optional<Index> vocab) {
  const Reader args(graph, ref);
  for (const auto* name : {"vocab_size", "padded_vocab_size"}) args.integer(name, 0);  // were taken for absent where they are no numbers
  for (const auto* name : {"heterogeneous_layers_config_path", "hybrid_override_pattern", "hybrid_layer_pattern", "is_hybrid_model"})
    if (args.set(name)) shard::fail(Code::BadFormat, "args.{}: is set; this forward pass knows plain decoders", name);
  for (const auto* name : {"enable_hyper_connections", "multi_modal", "moe_router_force_load_balancing"}) args.refuse(name);
  TransformerConfig out;
  const auto size = [&](const char* param, const char* name) {
    const auto found = params.find(param);
    return found != params.end() && found->second > 0 ? found->second : args.needed(name);
  };
  out.num_layers = size("layers", "num_layers");
  shard::require(out.num_layers <= 100'000, Code::BadFormat, [&] { return fmt::format("model: {} layers; at most 100000 are taken for real", out.num_layers); });
  out.hidden_size = size("hidden", "hidden_size");
  out.num_attention_heads = size("heads", "num_attention_heads");
  out.ffn_hidden_size = args.integer("ffn_hidden_size", 4 * out.hidden_size);
  out.num_query_groups = args.flag("group_query_attention") ? args.needed("num_query_groups") : out.num_attention_heads;
  out.kv_channels = args.integer("kv_channels", out.hidden_size / out.num_attention_heads);
  if (const auto groups = params.find("groups"); groups != params.end()) out.num_query_groups = groups->second;
  if (const auto head = params.find("head"); head != params.end()) out.kv_channels = head->second;
  shard::require(out.num_query_groups > 0 && out.num_attention_heads % out.num_query_groups == 0, Code::Mismatch,
                 [&] { return fmt::format("args: {} attention heads in {} query groups; should divide evenly", out.num_attention_heads, out.num_query_groups); });
  out.vocab_size = vocab.value_or(0);
  out.max_position_embeddings = args.integer("max_position_embeddings", 0);
  out.tied = !args.flag("untie_embeddings_and_output_weights");

  const auto norm = args.text("normalization", "LayerNorm");
  shard::require(norm == "LayerNorm" || norm == "RMSNorm", Code::BadFormat, [&] { return fmt::format("args.normalization: is '{}'; LayerNorm and RMSNorm are known", norm); });
  out.normalization = norm == "RMSNorm" ? shard::Normalization::RMSNorm : shard::Normalization::LayerNorm;
  out.layernorm_epsilon = out.latent_norm_epsilon = args.real("layernorm_epsilon").value_or(args.real("norm_epsilon", 1e-5));
  out.layernorm_zero_centered_gamma = args.flag("layernorm_zero_centered_gamma") || args.flag("apply_layernorm_1p");
  out.qk_l2_norm = args.flag("qk_l2_norm");
  out.residual_post_layernorm = args.flag("apply_residual_connection_post_layernorm");
  out.attention_output_gate = args.flag("attention_output_gate");
  if (out.attention_output_gate) shard::fail(Code::BadFormat, "args.attention_output_gate: is set; this forward pass does not know it");
  const auto softmax = args.text("softmax_type", "vanilla");
  if (softmax == "off-by-one") out.off_by_one_softmax = true;
  else if (softmax != "vanilla" && softmax != "learnable") shard::fail(Code::BadFormat, "args.softmax_type: is '{}'; vanilla, off-by-one and learnable are known", softmax);
  read_activation(args, out);

  out.multi_latent_attention = args.flag("multi_latent_attention");
  if (out.multi_latent_attention) {
    out.q_lora_rank = args.integer("q_lora_rank", 0);
    out.kv_lora_rank = args.needed("kv_lora_rank");
    out.qk_head_dim = args.needed("qk_head_dim");
    out.qk_pos_emb_head_dim = args.needed("qk_pos_emb_head_dim");
    out.v_head_dim = args.needed("v_head_dim");
  }
  const auto positions = args.text("position_embedding_type", "learned_absolute");
  out.rope = read_rope(args, out, positions);

  out.num_experts = args.integer("num_experts", 0);
  out.moe_ffn_hidden_size = args.integer("moe_ffn_hidden_size", out.ffn_hidden_size);
  out.moe_shared_expert_size = args.integer("moe_shared_expert_intermediate_size", 0);
  if (out.num_experts) read_router(args, out);

  double scale = 1 / std::sqrt(static_cast<double>(out.kv_channels));
  const auto given = args.real("softmax_scale");
  if (given) scale = *given;
  out.use_mup = args.flag("use_mup");
  if (out.use_mup) {
    const auto base = args.real("mup_base_hidden_size", static_cast<double>(out.hidden_size));
    shard::require(base > 0, Code::BadFormat, [&] { return fmt::format("args.mup_base_hidden_size: is {}; should be positive", base); });
    const auto head = args.real("mup_base_head_dim");
    if (!given) scale = (head ? std::sqrt(*head) : 1.0) / std::pow(static_cast<double>(out.kv_channels), args.real("mup_attn_scale_power", 1));
    out.embedding_multiplier = args.real("mup_embedding_mult", 1);
    out.logits_multiplier = args.real("mup_output_mult", 1);
    // mup_width_mult as an argument counts for nothing: Megatron works it out again.
    if (out.logits_multiplier == 1) out.logits_multiplier = base / static_cast<double>(out.hidden_size);
  }
  if (out.multi_latent_attention) {
    const auto m = concentration(args.real("rotary_scaling_factor", 40), args.real("mscale_all_dim", 0));
    scale = m * m / std::sqrt(static_cast<double>(out.qk_head_dim + out.qk_pos_emb_head_dim));
  }

  const auto moe = per_layer(args, "moe_layer_freq", out.num_layers, true, [](Index i, Index n) { return i % n == 0; });
  const auto skip_rope = per_layer(args, "no_rope_freq", out.num_layers, false, [](Index i, Index n) { return i % n == n - 1; });
  const auto window = args.list("window_size");
  shard::require(!args.has("window_size") || (window && window->size() == 2), Code::BadFormat, [] { return "args.window_size: should be two integers"; });
  const auto sliding = per_layer(args, "window_attn_skip_freq", out.num_layers, true, [](Index i, Index n) { return (i + 1) % n != 0; });
  for (Index i = 0; i < out.num_layers; ++i) {
    const auto at = static_cast<std::size_t>(i);
    shard::LayerConfig layer;
    layer.moe = out.num_experts > 0 && moe[at];
    layer.rope = out.rope.type != RopeConfig::Type::None && !skip_rope[at];
    if (window && (*window)[0] >= 0 && sliding[at]) layer.window = (*window)[0] + 1;
    layer.softmax_scale = scale;
    out.layers.push_back(layer);
  }
  out.mtp_num_layers = args.integer("mtp_num_layers", 0);
  out.mtp_repeated_layer = args.flag("mtp_use_repeated_layer");
  out.mtp_loss_scaling_factor = args.real("mtp_loss_scaling_factor", 0.1);
  out.family = out.multi_latent_attention ? "megatron mla" : out.num_experts ? "megatron moe" : positions == "learned_absolute" ? "megatron gpt" : "megatron llama";
  return out;
}

}  // namespace formats::megatron
