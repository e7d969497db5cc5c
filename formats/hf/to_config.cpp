// Megatron's args as config.json: the inverse of to_args.cpp, for models that bring no config of their own.
#include "formats/hf/hf.h"
#include "formats/hf_config.h"
#include "formats/megatron/args.h"
#include "formats/megatron/model_config.h"
#include "libshard/error.h"

#include <cmath>
#include <string_view>
#include <type_traits>

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
    computes_the_same();
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
    else if (percent != 1 || family_.defaults.contains("partial_rotary_factor")) out_["partial_rotary_factor"] = percent;
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
    if (size("experts") <= 0) {
      if (family_.sparse_layers == "first_dense") out_["first_k_dense_replace"] = source_.megatron->layers;  // its class has experts by default
      return;
    }
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

  /// What args call for and config.json gives, where it is not the same: few families have a place for every setting, and a model
  /// that computes something else is no conversion.
  void computes_the_same() {
    const bool multiplies = args_.flag("use_mup") || real("softmax_scale", 0) != 0;
    shard::TransformerConfig ours, theirs;
    try {
      ours = megatron::model_config(graph_, source_.megatron->args, params_, source_.vocab);
      theirs = hf_model_config(nlohmann::json::parse(out_.dump()), "config.json");
    } catch (const shard::Error&) {  // a setting that no forward pass here knows, or a user's own family: nothing to compare
      if (multiplies) throw;
      return;
    }
    if (name_activation(ours, theirs)) theirs = hf_model_config(nlohmann::json::parse(out_.dump()), "config.json");
    const auto same = [&](const char* arg, const auto& wanted, const auto& found) {
      bool close;
      if constexpr (std::is_convertible_v<decltype(wanted), std::string_view>) close = std::string_view(wanted) == std::string_view(found);
      else if constexpr (std::is_same_v<std::decay_t<decltype(wanted)>, double>) close = std::abs(wanted - found) <= 1e-6 * std::abs(wanted);
      else close = wanted == found;
      shard::require(close, shard::Code::Mismatch, [&] { return fmt::format("args.{}: calls for {}; {}'s config.json gives {} and has no place for another", arg, wanted, family_.name, found); });
    };
    if (multiplies) {
      same("mup_embedding_mult", ours.embedding_multiplier, theirs.embedding_multiplier);
      same("mup_output_mult", ours.logits_multiplier, theirs.logits_multiplier);
    }
    if (family_.name.starts_with("gemma")) return;  // much of it only config.json says
    same("layernorm_zero_centered_gamma", ours.layernorm_zero_centered_gamma, theirs.layernorm_zero_centered_gamma);
    same("qk_l2_norm", ours.qk_l2_norm, theirs.qk_l2_norm);
    same("apply_residual_connection_post_layernorm", ours.residual_post_layernorm, theirs.residual_post_layernorm);
    same("softmax_type", ours.off_by_one_softmax ? "off-by-one" : "vanilla", theirs.off_by_one_softmax ? "off-by-one" : "vanilla");
    same("swiglu, squared_relu, quick_geglu, bias_gelu_fusion", name_of(ours.activation), name_of(theirs.activation));
    same("glu_linear_offset", ours.glu_linear_offset, theirs.glu_linear_offset);
    same("activation_func_clamp_value", ours.activation_clamp.value_or(0), theirs.activation_clamp.value_or(0));
    if (args_.value("position_embedding_type")) same_positions(ours, theirs, same);
    for (std::size_t i = 0; i < ours.layers.size() && i < theirs.layers.size(); ++i) {
      same("window_size", ours.layers[i].window, window_in(theirs, i));
      if (!ours.multi_latent_attention) same("softmax_scale", ours.layers[i].softmax_scale, theirs.layers[i].softmax_scale);
    }
    if (ours.num_experts > 0) same_routes(ours, theirs, same);
  }

  /// What the family's class makes of the fields: some know no window, some only one for all layers.
  Index window_in(const shard::TransformerConfig& theirs, std::size_t layer) const {
    if (family_.window.empty()) return 0;
    return family_.window == "all" ? out_.value("sliding_window", Index{0}) : theirs.layers[layer].window;
  }

  static std::string_view name_of(shard::Activation activation) {
    switch (activation) {
      case shard::Activation::Silu: return "silu";
      case shard::Activation::GeluErf: return "gelu";
      case shard::Activation::GeluTanh: return "gelu_new";
      case shard::Activation::Relu: return "relu";
      case shard::Activation::SquaredRelu: return "relu2";
      case shard::Activation::QuickGelu: return "quick_gelu";
    }
    return "";
  }
  /// Families that name their activation can have another; whether they do.
  bool name_activation(const shard::TransformerConfig& ours, const shard::TransformerConfig& theirs) {
    if (ours.activation == theirs.activation || ours.gated_linear_unit != theirs.gated_linear_unit || family_.name.starts_with("gemma")) return false;
    for (const char* field : {"activation_function", "hidden_act"})
      if (family_.config.contains(field)) {
        out_[field] = name_of(ours.activation);
        return true;
      }
    return false;
  }

  template <typename Same>
  void same_positions(const shard::TransformerConfig& ours, const shard::TransformerConfig& theirs, const Same& same) const {
    using Type = shard::RopeConfig::Type;
    const auto kind = [](const shard::RopeConfig& rope) {
      const bool plain = rope.type == Type::Default || (rope.type == Type::Yarn && rope.factor == 1);
      return rope.type == Type::None ? "no rotation" : plain ? "plain rotation" : rope.type == Type::Yarn ? "yarn" : rope.type == Type::Llama3 ? "llama3 scaling" : "scaled rotation";
    };
    const bool latent = ours.multi_latent_attention;
    same(latent ? "rope_type" : "position_embedding_type", kind(ours.rope), kind(theirs.rope));
    if (ours.rope.type == Type::None) return;
    // Other models than these turn all lanes, whatever partial_rotary_factor says.
    const bool partial = family_.name == "gpt_neox" || family_.name == "phi3" || family_.name == "nemotron";
    same("rotary_percent", ours.rope.dim, partial || latent ? theirs.rope.dim : theirs.kv_channels);
    same("rotary_base", ours.rope.base, theirs.rope.base);
    same("rotary_interleaved", ours.rope.interleaved, theirs.rope.interleaved);
    same("rotary_scaling_factor", ours.rope.factor, theirs.rope.factor);
    for (std::size_t i = 0; i < ours.layers.size() && i < theirs.layers.size(); ++i)
      same("no_rope_freq", ours.layers[i].rope ? "rotation in every layer" : "layers without", theirs.layers[i].rope ? "rotation in every layer" : "layers without");
  }

  template <typename Same>
  void same_routes(const shard::TransformerConfig& ours, const shard::TransformerConfig& theirs, const Same& same) const {
    const auto &a = ours.router, &b = theirs.router;
    const auto score = [](shard::RouterConfig::Score one) { return one == shard::RouterConfig::Score::Softmax ? "softmax" : one == shard::RouterConfig::Score::Sigmoid ? "sigmoid" : "sqrtsoftplus"; };
    same("moe_router_score_function", score(a.score), score(b.score));
    same("moe_router_topk", a.topk, b.topk);
    if (a.score == shard::RouterConfig::Score::Softmax) same("moe_router_pre_softmax", a.pre_softmax, b.pre_softmax);
    else if (a.topk > 1) same("moe_router_score_function", a.renormalize ? "weights that sum to one" : "weights as they are", b.renormalize ? "weights that sum to one" : "weights as they are");
    same("moe_router_topk_scaling_factor", a.scaling, b.scaling);
    same("moe_apply_probs_on_input", ours.moe_probs_on_input, theirs.moe_probs_on_input);
    const auto groups = [](const shard::RouterConfig& one) { return one.group_topk > 0 && one.group_topk < one.num_groups ? one.num_groups : 0; };  // all of them: no limit
    same("moe_router_num_groups", groups(a), groups(b));
    if (groups(a) == 0) return;
    same("moe_router_group_topk", a.group_topk, b.group_topk);
    const auto rule = [](const shard::RouterConfig& one) { return one.group_rule == shard::RouterConfig::GroupRule::Max ? std::string("the best of a group") : fmt::format("the sum of a group's best {}", one.group_best); };
    same("moe_router_topk", rule(a), rule(b));
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
