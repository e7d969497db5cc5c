// Megatron's args as config.json: the inverse of to_args.cpp, for models that bring no config of their own.
#include "formats/hf/hf.h"
#include "formats/hf_config.h"
#include "formats/megatron/args.h"
#include "formats/megatron/model_config.h"
#include "libshard/error.h"

#include <cmath>

namespace formats::hf {
namespace {

using Json = nlohmann::ordered_json;
using pickle::Kind;
using pickle::Ref;
using shard::Index;

Json json_of(const pickle::Graph& g, Ref ref) {
  switch (g.kind(ref)) {
    case Kind::Bool: return g.boolean(ref);
    case Kind::Int: return g.integer(ref);
    case Kind::Float: return g.real(ref);
    case Kind::Text: return std::string(g.text(ref));
    default: return nullptr;
  }
}

class Writer {
 public:
  Writer(const Family& family, const Checkpoint& source)
      : family_(family), source_(source), params_(source.params), graph_(*source.megatron->common), args_(graph_, source.megatron->args) {}

  Json write() {
    out_["architectures"] = Json::array({family_.architecture});
    out_["model_type"] = family_.model_types.empty() ? family_.name : family_.model_types.front();
    for (const auto& [name, value] : family_.config.items()) out_[name] = value;
    for (const auto& [name, arg] : family_.fields.items()) {
      if (!arg.is_string()) continue;
      auto value = args_.value(arg.get<std::string>());
      if (!value && arg == "norm_epsilon") value = args_.value("layernorm_epsilon");
      if (value) out_[name] = json_of(graph_, *value);
    }
    sizes();
    rope();
    window();
    mixture();
    multipliers();
    return out_;
  }

 private:
  Index size(const char* name) const { return params_.contains(name) ? params_.find(name)->second : 0; }
  /// Writes a parameter under the field that the family reads it from, where that is a plain field.
  void put(const char* param, Index value) {
    const auto found = family_.params.find(param);
    if (found == family_.params.end()) return;
    const auto expression = found->is_array() ? (*found)[0] : *found;
    if (!expression.is_string()) return;
    const auto name = expression.get<std::string>();
    if (name.find_first_of("+-*/ ()0123456789") == name.npos) out_[name] = value;
  }
  void put_flag(const char* param, bool value) {
    const auto found = family_.params.find(param);
    if (found != family_.params.end() && found->is_string() && !std::isdigit(static_cast<unsigned char>(found->get<std::string>()[0]))) out_[found->get<std::string>()] = value;
  }

  void sizes() {
    for (const auto* name : {"hidden", "heads", "groups", "ffn", "positions", "experts", "expert_ffn", "shared_ffn", "q_lora", "kv_lora", "nope", "rope_dim", "value_head"})
      if (params_.contains(name)) put(name, size(name));
    put("layers", source_.megatron->layers);
    if (source_.vocab) put("vocab", *source_.vocab);
    if (!shard::holds("mla", params_) && params_.contains("head")) put("head", size("head"));
    if (source_.megatron->mtp_layers > 0) put("mtp", source_.megatron->mtp_layers);
    if (size("expert_ffn") > 0 && family_.params.value("expert_ffn", Json()) == "intermediate_size") out_["intermediate_size"] = size("expert_ffn");
    if (shard::holds("mla", params_) && !params_.contains("q_lora")) out_["q_lora_rank"] = nullptr;
    if (shard::holds("mla", params_)) out_["num_key_value_heads"] = size("heads"), out_["rope_interleave"] = true;
    if (family_.name.starts_with("deepseek") && size("expert_ffn") > 0) out_["n_shared_experts"] = size("shared_ffn") / size("expert_ffn");
    out_["tie_word_embeddings"] = source_.tied.value_or(false);
    put_flag("qkv_bias", shard::holds("qkv_bias", params_));
    put_flag("mlp_bias", shard::holds("mlp_bias", params_));
    const auto found = source_.logical.tensors.find("embedding.word.weight");
    if (found != source_.logical.tensors.end())
      out_["torch_dtype"] = found->second.dtype == shard::DType::BF16 ? "bfloat16" : found->second.dtype == shard::DType::F16 ? "float16" : "float32";
  }

  double real(const char* name, double otherwise) const {
    const auto value = args_.value(name);
    if (!value || (graph_.kind(*value) != Kind::Float && graph_.kind(*value) != Kind::Int)) return otherwise;
    return graph_.kind(*value) == Kind::Float ? graph_.real(*value) : static_cast<double>(graph_.integer(*value));
  }

  void rope() {
    if (shard::holds("learned_positions", params_)) return;
    const bool neox = family_.name == "gpt_neox";
    out_[neox ? "rotary_emb_base" : "rope_theta"] = real("rotary_base", 10000);
    const auto percent = real("rotary_percent", 1);
    if (neox) out_["rotary_pct"] = percent;
    else if (percent != 1) out_["partial_rotary_factor"] = percent;
    const auto position = args_.text("position_embedding_type").value_or("rope");
    const bool latent = shard::holds("mla", params_);
    if (args_.flag("use_rope_scaling"))
      out_["rope_scaling"] = {{"rope_type", "llama3"}, {"factor", real("rope_scaling_factor", 8)}, {"low_freq_factor", 1.0}, {"high_freq_factor", 4.0}, {"original_max_position_embeddings", 8192}};
    else if (position == "yarn" || (latent && args_.text("rope_type").value_or("yarn") == "yarn" && real("rotary_scaling_factor", 1) != 1)) {
      out_["rope_scaling"] = {{"rope_type", "yarn"}, {"factor", real("rotary_scaling_factor", 1)},
                              {"original_max_position_embeddings", static_cast<Index>(real("yarn_original_max_position_embeddings", 4096))},
                              {"beta_fast", real("yarn_beta_fast", 32)}, {"beta_slow", real("yarn_beta_slow", 1)}};
      if (latent) out_["rope_scaling"]["mscale"] = real("mscale", 1), out_["rope_scaling"]["mscale_all_dim"] = real("mscale_all_dim", 0);
      else out_["rope_scaling"]["truncate"] = !args_.value("yarn_correction_range_round_to_int") || args_.flag("yarn_correction_range_round_to_int");
    } else if (const auto factor = real("rotary_seq_len_interpolation_factor", 1); factor != 1) {
      out_["rope_scaling"] = {{"rope_type", "linear"}, {"factor", factor}};
    } else if (family_.name == "gpt_oss") {
      out_["rope_scaling"] = {{"rope_type", "default"}};  // null is its class's own yarn
    } else {
      out_["rope_scaling"] = nullptr;
    }
  }

  void window() {
    const auto value = args_.value("window_size");
    if (!value || (graph_.kind(*value) != Kind::Tuple && graph_.kind(*value) != Kind::List) || graph_.items(*value).empty()) return;
    const auto back = graph_.items(*value)[0];
    if (graph_.kind(back) != Kind::Int) return;
    out_["sliding_window"] = graph_.integer(back) + 1;
    out_["use_sliding_window"] = true;
    const auto skip = args_.integer("window_attn_skip_freq");
    auto types = Json::array();
    const auto list = args_.value("window_attn_skip_freq");
    for (Index l = 0; l < source_.megatron->layers; ++l) {
      bool slides = true;
      if (skip && *skip > 0) slides = (l + 1) % *skip != 0;
      else if (list && graph_.kind(*list) == Kind::List && static_cast<std::size_t>(l) < graph_.items(*list).size())
        slides = graph_.integer(graph_.items(*list)[static_cast<std::size_t>(l)]) != 0;
      types.push_back(slides ? "sliding_attention" : "full_attention");
    }
    out_["layer_types"] = types;
  }

  void mixture() {
    if (size("experts") <= 0) return;
    std::vector<Index> dense;
    for (Index l = 0; l < source_.megatron->layers; ++l)
      if (!source_.logical.tensors.contains(fmt::format("layers.{}.mlp.router.weight", l))) dense.push_back(l);
    if (family_.sparse_layers == "first_dense") {
      for (std::size_t i = 0; i < dense.size(); ++i)
        shard::require(dense[i] == static_cast<Index>(i), shard::Code::Mismatch, [&] { return fmt::format("layers.{}: is dense behind a layer with experts; {} cannot say so", dense[i], family_.name); });
      out_["first_k_dense_replace"] = dense.size();
      if (const auto groups = args_.integer("moe_router_num_groups")) out_["n_group"] = *groups, out_["topk_group"] = args_.integer("moe_router_group_topk").value_or(1);
      else out_["n_group"] = 1, out_["topk_group"] = 1;
    } else if (family_.sparse_layers == "step") {
      out_["decoder_sparse_step"] = 1;
      out_["mlp_only_layers"] = dense;
      out_["norm_topk_prob"] = !args_.flag("moe_router_pre_softmax");
    } else {
      shard::require(dense.empty(), shard::Code::Mismatch, [&] { return fmt::format("layers.{}: is dense; every layer of {} has experts", dense.front(), family_.name); });
    }
  }

  /// config.json must multiply as args do, or the model computes something else: few families have a place for MuP's factors.
  void multipliers() const {
    if (!args_.flag("use_mup") && real("softmax_scale", 0) == 0) return;
    const auto ours = megatron::model_config(graph_, source_.megatron->args, params_, source_.vocab);
    const auto theirs = hf_model_config(nlohmann::json::parse(out_.dump()), "config.json");
    const auto same = [&](const char* arg, double wanted, double found) {
      shard::require(std::abs(wanted - found) <= 1e-6 * std::abs(wanted), shard::Code::Mismatch,
                     [&] { return fmt::format("args.{}: calls for {}; {}'s config.json gives {} and has no place for another", arg, wanted, family_.name, found); });
    };
    same("mup_embedding_mult", ours.embedding_multiplier, theirs.embedding_multiplier);
    same("mup_output_mult", ours.logits_multiplier, theirs.logits_multiplier);
    for (std::size_t i = 0; i < ours.layers.size() && !ours.multi_latent_attention; ++i) same("softmax_scale", ours.layers[i].softmax_scale, theirs.layers[i].softmax_scale);
  }

  const Family& family_;
  const Checkpoint& source_;
  const shard::Params& params_;
  const pickle::Graph& graph_;
  megatron::Args args_;
  Json out_;
};

}  // namespace

Json config_of(const Family& family, const Checkpoint& source) { return Writer(family, source).write(); }

}  // namespace formats::hf
