// Megatron's args as config.json: the inverse of to_args.cpp, for models that bring no config of their own.
#include "formats/hf/hf.h"
#include "formats/hf/layer_rules.h"
#include "formats/hf/same_model.h"
#include "formats/hf_config.h"
#include "formats/megatron/args.h"
#include "formats/megatron/model_config.h"
#include "libshard/error.h"

#include <algorithm>
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

/// What args compute; nullopt where the forward pass does not know them, or they do not say.
std::optional<shard::TransformerConfig> forward_of(const Checkpoint& source) {
  if (source.megatron->common->is_none(source.megatron->args)) return std::nullopt;
  try {
    return megatron::model_config(*source.megatron->common, source.megatron->args, source.params, source.vocab);
  } catch (const shard::Error&) {
    return std::nullopt;
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
    if (family_.name == "phi3") out_["pad_token_id"] = nullptr;  // the class has one that smaller vocabularies lack
    for (const auto& [name, arg] : family_.fields.items()) {
      if (!arg.is_string()) continue;
      auto value = args_.value(arg.get<std::string>());
      if (arg == "norm_epsilon")
        if (const auto newer = args_.value("layernorm_epsilon")) value = newer;  // its name since core 0.16
      if (value) out_[name] = json_of(graph_, *value);
    }
    sizes();
    rope();
    window();
    mixture();
    refuse_unknown();
    refuse_another_model();
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
    else if (percent != 1 || turns_parts(family_)) out_["partial_rotary_factor"] = percent;
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
    const bool given = value && (graph_.kind(*value) == Kind::Tuple || graph_.kind(*value) == Kind::List) && !graph_.items(*value).empty();
    const auto back = given ? graph_.items(*value)[0] : Ref();
    if (!given || graph_.kind(back) != Kind::Int || graph_.integer(back) < 0) {
      // Classes with a window of their own have it where config.json is silent.
      if (family_.window == "even" || family_.window == "pattern") out_["layer_types"] = Json(static_cast<std::size_t>(source_.megatron->layers), "full_attention");
      return;
    }
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
      if (family_.sparse_layers == "first_dense") out_["first_k_dense_replace"] = source_.megatron->layers;  // the class has experts of its own accord
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

  /// What changes the forward pass in ways of which no config.json speaks. Asked for first: the forward pass here does not know them either.
  void refuse_unknown() const {
    for (const auto* name : {"attention_output_gate", "is_hybrid_model", "hybrid_override_pattern", "hybrid_layer_pattern", "heterogeneous_layers_config_path"})
      shard::require(!args_.flag(name) && args_.text(name).value_or("").empty(), shard::Code::Mismatch,
                     [&] { return fmt::format("args.{}: is set; {}'s config.json has no place for it", name, family_.name); });
    const auto positions = args_.text("position_embedding_type").value_or("rope");
    shard::require(positions == "rope" || positions == "yarn" || positions == "learned_absolute" || positions == "none", shard::Code::Mismatch,
                   [&] { return fmt::format("args.position_embedding_type: is '{}'; {}'s config.json has no place for it", positions, family_.name); });
  }

  /// config.json must compute what args do, or the model computes something else. Args that speak of training alone, and
  /// that our own forward pass does not know, are none of its business.
  void refuse_another_model() {
    const auto config = [&] { return nlohmann::json::parse(out_.dump()); };
    const bool training = args_.value("moe_expert_capacity_factor") || args_.flag("moe_router_force_load_balancing") || args_.text("moe_router_load_balancing_type") == "sinkhorn";
    if (training || !args_.present() || !knows_model(config())) return;
    const auto ours = megatron::model_config(graph_, source_.megatron->args, params_, source_.vocab);
    using shard::Activation;
    if (!ours.gated_linear_unit && (ours.activation == Activation::GeluErf || ours.activation == Activation::GeluTanh))
      out_[family_.config.contains("activation_function") ? "activation_function" : "hidden_act"] = ours.activation == Activation::GeluErf ? "gelu" : "gelu_new";
    const bool positions = args_.value("position_embedding_type").has_value();
    const auto warned = parts_of_warnings(family_.warn);
    for (const auto& found : differences(ours, hf_model_config(config(), "config.json")))
      shard::require(warned.contains(found.part) || (!positions && found.part.starts_with("rope ")), shard::Code::Mismatch, [&] {
        return fmt::format("{}{} is {} by Megatron's args; {}'s config.json gives {} and has no place for another", found.where, found.part, found.megatron, family_.name, found.hugging_face);
      });
  }

  const Family& family_;
  const Checkpoint& source_;
  const shard::Params& params_;
  const pickle::Graph& graph_;
  megatron::Args args_;
  Json out_;
};

}  // namespace

const Family* family_by_settings(const Checkpoint& source) {
  const auto* found = recognise(source.params);
  if (!found || found->name != "llama" || !source.megatron || shard::holds("qkv_bias", source.params) || shard::holds("mlp_bias", source.params)) return found;
  const auto settings = forward_of(source);
  if (!settings) return found;
  const auto named = [](const char* name) { return &*std::find_if(families().begin(), families().end(), [&](const Family& family) { return family.name == name; }); };
  if (settings->rope.type == shard::RopeConfig::Type::Default && settings->rope.dim != settings->kv_channels) return named("phi3");
  if (std::all_of(settings->layers.begin(), settings->layers.end(), [](const auto& layer) { return layer.window > 0; })) return named("mistral");
  return found;
}

Json config_of(const Family& family, const Checkpoint& source) { return Writer(family, source).write(); }

}  // namespace formats::hf
