// Class defaults and spellings of transformers 4.x and 5.x, family by family; a model_type that is not listed is refused.
#include "formats/hf_config.h"

#include "libshard/error.h"

#include <algorithm>
#include <cmath>
#include <set>

namespace formats {
namespace {

using nlohmann::json;
using shard::Activation;
using shard::Code;
using shard::Index;
using shard::RopeConfig;
using shard::RouterConfig;
using shard::TransformerConfig;

/// Fields of one object; null counts as absent.
class Fields {
 public:
  Fields(const json& object, std::string where) : object_(&object), where_(std::move(where)) {
    shard::require(object_->is_object(), Code::BadFormat, [&] { return fmt::format("{}: should be an object", where_); });
  }
  const json* find(const char* name) const {
    const auto found = object_->find(name);
    return found == object_->end() || found->is_null() ? nullptr : &*found;
  }
  bool has(const char* name) const { return find(name) != nullptr; }
  bool mentions(const char* name) const { return object_->contains(name); }  ///< even as null
  std::optional<double> real(std::initializer_list<const char*> names) const {
    for (const auto* name : names)
      if (const auto* value = find(name)) {
        shard::require(value->is_number(), Code::BadFormat, [&] { return fmt::format("{}: {} should be a number", where_, name); });
        return value->get<double>();
      }
    return std::nullopt;
  }
  std::optional<Index> integer(std::initializer_list<const char*> names) const {
    const auto value = real(names);
    if (!value) return std::nullopt;
    shard::require(*value == std::floor(*value) && std::abs(*value) < 9e15, Code::BadFormat, [&] { return fmt::format("{}: {} should be an integer", where_, *names.begin()); });
    return static_cast<Index>(*value);
  }
  Index needed(std::initializer_list<const char*> names) const {
    const auto value = integer(names);
    shard::require(value && *value > 0, Code::BadFormat, [&] { return fmt::format("{}: lacks {}", where_, *names.begin()); });
    return *value;
  }
  double positive(const char* name) const {
    const auto value = real({name});
    shard::require(value.has_value(), Code::BadFormat, [&] { return fmt::format("{}: lacks {}", where_, name); });
    shard::require(*value > 0, Code::BadFormat, [&] { return fmt::format("{}: {} is {}; should be positive", where_, name, *value); });
    return *value;
  }
  /// Every so many layers are of another kind.
  Index step(std::initializer_list<const char*> names, Index otherwise) const {
    const auto value = integer(names).value_or(otherwise);
    shard::require(value > 0, Code::BadFormat, [&] { return fmt::format("{}: {} is {}; should be positive", where_, *names.begin(), value); });
    return value;
  }
  bool flag(const char* name, bool otherwise = false) const {
    const auto* value = find(name);
    if (!value) return otherwise;
    if (value->is_boolean()) return value->get<bool>();
    shard::require(value->is_number(), Code::BadFormat, [&] { return fmt::format("{}: {} should be true or false", where_, name); });
    return value->get<double>() != 0;
  }
  std::string text(std::initializer_list<const char*> names, const char* otherwise) const {
    for (const auto* name : names)
      if (const auto* value = find(name)) {
        shard::require(value->is_string(), Code::BadFormat, [&] { return fmt::format("{}: {} should be a text", where_, name); });
        return value->get<std::string>();
      }
    return otherwise;
  }
  std::vector<double> reals(const char* name) const {
    std::vector<double> out;
    const auto* value = find(name);
    shard::require(value && value->is_array(), Code::BadFormat, [&] { return fmt::format("{}: lacks the list {}", where_, name); });
    for (const auto& item : *value) {
      shard::require(item.is_number(), Code::BadFormat, [&] { return fmt::format("{}: {} should hold numbers", where_, name); });
      out.push_back(item.get<double>());
    }
    return out;
  }
  std::optional<Fields> object(const char* name) const {
    const auto* value = find(name);
    if (!value) return std::nullopt;
    return Fields(*value, where_ + ": " + name);
  }
  const std::string& where() const { return where_; }

 private:
  const json* object_;
  std::string where_;
};

/// What the class of a model_type has where its config.json is silent.
struct Class {
  const char* type;
  double rms_eps = 1e-6, rope_theta = 10000;
  Index head_dim = 0;       ///< 0: hidden / heads
  bool tied = false;
  double partial = 1;
  const char* activation = "silu";
};
constexpr Class kClasses[] = {
    {"llama"}, {"mistral"}, {"qwen2"}, {"qwen3", 1e-6, 10000, 128}, {"qwen2_moe"}, {"qwen3_moe"},
    {"mixtral", 1e-5, 1e6}, {"phi3", 1e-5}, {"deepseek_v2"}, {"deepseek_v3"},
    {"gemma", 1e-6, 10000, 256, true, 1, "gelu_pytorch_tanh"}, {"gemma2", 1e-6, 10000, 256, true, 1, "gelu_pytorch_tanh"},
    {"gemma3_text", 1e-6, 1e6, 256, true, 1, "gelu_pytorch_tanh"}, {"gpt_oss", 1e-5, 150000, 64},
    {"gpt2", 1e-5, 10000, 0, true, 1, "gelu_new"}, {"gpt_neox", 1e-5, 10000, 0, false, 0.25, "gelu"}, {"nemotron", 1e-5, 10000, 0, false, 0.5, "relu2"},
};

Activation activation_named(const std::string& name, const std::string& where) {
  if (name == "silu" || name == "swish") return Activation::Silu;
  if (name == "gelu" || name == "gelu_python") return Activation::GeluErf;
  if (name == "gelu_new" || name == "gelu_pytorch_tanh" || name == "gelu_fast") return Activation::GeluTanh;
  if (name == "relu") return Activation::Relu;
  if (name == "relu2") return Activation::SquaredRelu;
  if (name == "quick_gelu") return Activation::QuickGelu;
  shard::fail(Code::BadFormat, "{}: activation '{}' is not known", where, name);
}

double concentration(double scale, double mscale) { return scale <= 1 ? 1 : 0.1 * mscale * std::log(scale) + 1; }

class Reader {
 public:
  Reader(const json& config, std::string_view where) : all_(config, std::string(where)), type_(all_.text({"model_type"}, "")) {
    const auto found = std::find_if(std::begin(kClasses), std::end(kClasses), [&](const Class& c) { return type_ == c.type; });
    shard::require(found != std::end(kClasses), Code::BadFormat, [&] { return fmt::format("{}: model_type '{}' is no family whose forward pass is known", where, type_); });
    class_ = *found;
  }

  TransformerConfig read() {
    // transformers makes attention look both ways; this forward pass is causal.
    shard::require(all_.flag("is_causal", true), Code::BadFormat, [&] { return fmt::format("{}: is_causal is false; this forward pass is causal", all_.where()); });
    sizes();
    norms();
    activation();
    experts();
    rope();
    layers();
    out_.tied = all_.flag("tie_word_embeddings", class_.tied);
    out_.parallel_residual = type_ == "gpt_neox" && all_.flag("use_parallel_residual", true);
    if (gemma()) {
      out_.embedding_multiplier = std::sqrt(static_cast<double>(out_.hidden_size));
      out_.embedding_multiplier_rounded = true;
      shard::require(!all_.flag("use_bidirectional_attention"), Code::BadFormat,
                     [&] { return fmt::format("{}: use_bidirectional_attention is set; this forward pass is causal", all_.where()); });
      // Gemma 2's class has caps; null switches them off.
      const auto cap = [&](const char* name, double otherwise) {
        return all_.real({name}).value_or(type_ == "gemma2" && !all_.mentions(name) ? otherwise : 0);
      };
      if (type_ == "gemma2") out_.attention_softcap = cap("attn_logit_softcapping", 50);
      if (type_ != "gemma") out_.logits_softcap = cap("final_logit_softcapping", 30);
      if (type_ == "gemma3_text" && cap("attn_logit_softcapping", 0) != 0) out_.notes.push_back("attn_logit_softcapping is left out, as transformers does for Gemma 3");
    }
    if (type_ == "deepseek_v3") out_.mtp_num_layers = all_.integer({"num_nextn_predict_layers"}).value_or(0);
    return std::move(out_);
  }

 private:
  bool gemma() const { return type_ == "gemma" || type_ == "gemma2" || type_ == "gemma3_text"; }
  /// Classes that look at no partial_rotary_factor.
  bool turns_whole_heads() const { return type_ != "phi3" && type_ != "gpt_neox" && type_ != "nemotron"; }
  bool deepseek() const { return type_ == "deepseek_v2" || type_ == "deepseek_v3"; }

  void sizes() {
    out_.family = type_;
    out_.num_layers = all_.needed({"num_hidden_layers", "n_layer"});
    shard::require(out_.num_layers <= 100'000, Code::BadFormat, [&] { return fmt::format("model: {} layers; at most 100000 are taken for real", out_.num_layers); });
    out_.hidden_size = all_.needed({"hidden_size", "n_embd"});
    out_.num_attention_heads = all_.needed({"num_attention_heads", "n_head"});
    out_.num_query_groups = type_ == "gpt2" || type_ == "gpt_neox" ? out_.num_attention_heads : all_.integer({"num_key_value_heads"}).value_or(out_.num_attention_heads);
    shard::require(out_.num_query_groups > 0 && out_.num_attention_heads % out_.num_query_groups == 0, Code::Mismatch,
                   [&] { return fmt::format("{}: {} attention heads over {} key heads; should divide evenly", all_.where(), out_.num_attention_heads, out_.num_query_groups); });
    const auto even = out_.hidden_size / out_.num_attention_heads;
    // A class with a head size of its own writes it out; null means hidden / heads everywhere.
    const bool absent = !all_.mentions("head_dim");
    out_.kv_channels = all_.integer({"head_dim"}).value_or(absent && class_.head_dim ? class_.head_dim : even);
    out_.ffn_hidden_size = all_.integer({"intermediate_size", "n_inner"}).value_or(4 * out_.hidden_size);
    out_.vocab_size = all_.needed({"vocab_size"});
    out_.max_position_embeddings = all_.integer({"max_position_embeddings", "n_positions"}).value_or(0);
    if (!deepseek()) return;
    out_.multi_latent_attention = true;
    shard::require(!all_.flag("attention_bias"), Code::BadFormat, [&] { return fmt::format("{}: attention_bias is set; biases of latent attention are not known", all_.where()); });
    out_.q_lora_rank = all_.integer({"q_lora_rank"}).value_or(0);
    out_.kv_lora_rank = all_.needed({"kv_lora_rank"});
    out_.qk_head_dim = all_.needed({"qk_nope_head_dim"});
    out_.qk_pos_emb_head_dim = all_.needed({"qk_rope_head_dim"});
    out_.v_head_dim = all_.needed({"v_head_dim"});
    out_.num_query_groups = out_.num_attention_heads;
  }

  void norms() {
    const bool layer_norm = type_ == "gpt2" || type_ == "gpt_neox" || type_ == "nemotron";
    out_.normalization = layer_norm ? shard::Normalization::LayerNorm : shard::Normalization::RMSNorm;
    const char* epsilon = type_ == "gpt2" ? "layer_norm_epsilon" : type_ == "gpt_neox" ? "layer_norm_eps" : type_ == "nemotron" ? "norm_eps" : "rms_norm_eps";
    out_.layernorm_epsilon = all_.real({epsilon}).value_or(class_.rms_eps);
    out_.latent_norm_epsilon = 1e-6;  // transformers' class default, whatever rms_norm_eps says
    out_.layernorm_zero_centered_gamma = gemma() || type_ == "nemotron";
  }

  void activation() {
    out_.gated_linear_unit = !(type_ == "gpt2" || type_ == "gpt_neox" || type_ == "nemotron");
    if (type_ == "gpt_oss") {
      out_.activation = Activation::QuickGelu;
      out_.activation_alpha = all_.real({"swiglu_alpha"}).value_or(1.702);
      out_.activation_clamp = all_.real({"swiglu_limit"}).value_or(7);
      out_.glu_linear_offset = 1;
      return;
    }
    const auto name = type_ == "gpt2" ? all_.text({"activation_function"}, class_.activation)
                      : gemma()       ? all_.text({"hidden_activation"}, class_.activation)
                                      : all_.text({"hidden_act"}, class_.activation);
    out_.activation = gemma() && name == "gelu" && !all_.has("hidden_activation") ? Activation::GeluTanh : activation_named(name, all_.where());
    out_.activation_alpha = 1.702;
  }

  void experts() {
    auto& router = out_.router;
    router.topk = all_.integer({"num_experts_per_tok"}).value_or(type_ == "gpt_oss" || type_ == "qwen2_moe" ? 4 : type_ == "mixtral" ? 2 : 8);
    if (type_ == "mixtral" || type_ == "gpt_oss") {
      out_.num_experts = all_.integer({"num_local_experts", "num_experts"}).value_or(type_ == "mixtral" ? 8 : 128);
      out_.moe_ffn_hidden_size = out_.ffn_hidden_size;
    } else if (type_ == "qwen2_moe" || type_ == "qwen3_moe") {
      out_.num_experts = all_.integer({"num_experts", "num_local_experts"}).value_or(type_ == "qwen2_moe" ? 60 : 128);
      out_.moe_ffn_hidden_size = all_.needed({"moe_intermediate_size"});
      // Probabilities over all experts divided by the sum of the chosen are a softmax over the chosen logits: Megatron's form.
      router.pre_softmax = !all_.flag("norm_topk_prob", false);
      if (type_ == "qwen2_moe") out_.moe_shared_expert_size = all_.integer({"shared_expert_intermediate_size"}).value_or(0);
    } else if (deepseek()) {
      out_.num_experts = all_.integer({"n_routed_experts", "num_local_experts", "num_experts"}).value_or(type_ == "deepseek_v3" ? 256 : 64);
      out_.moe_ffn_hidden_size = all_.integer({"moe_intermediate_size"}).value_or(0);
      out_.moe_shared_expert_size = all_.integer({"n_shared_experts"}).value_or(0) * out_.moe_ffn_hidden_size;
      router.scaling = all_.real({"routed_scaling_factor"}).value_or(type_ == "deepseek_v3" ? 2.5 : 1);
      router.fp32 = true;
      router.num_groups = all_.integer({"n_group"}).value_or(type_ == "deepseek_v3" ? 8 : 0);
      router.group_topk = all_.integer({"topk_group"}).value_or(type_ == "deepseek_v3" ? 4 : 0);
      if (type_ == "deepseek_v3") {
        const auto scoring = all_.text({"scoring_func"}, "sigmoid");
        shard::require(scoring == "sigmoid", Code::BadFormat, [&] { return fmt::format("{}: scoring_func is '{}'; sigmoid is known", all_.where(), scoring); });
        router.score = RouterConfig::Score::Sigmoid;
        router.renormalize = all_.flag("norm_topk_prob", true);
        router.group_best = 2;
        // Of one expert transformers makes the weight 1, Megatron leaves its score.
        shard::require(!router.renormalize || router.topk > 1, Code::BadFormat, [&] { return fmt::format("{}: num_experts_per_tok is 1 and norm_topk_prob true; sigmoid routers are known with more, or without renormalised weights", all_.where()); });
      } else {
        const auto method = all_.text({"topk_method"}, "greedy");
        shard::require(method == "greedy" || method == "group_limited_greedy", Code::BadFormat, [&] { return fmt::format("{}: topk_method is '{}'; greedy and group_limited_greedy are known", all_.where(), method); });
        router.pre_softmax = true;
        router.group_rule = RouterConfig::GroupRule::Max;
        if (method == "greedy") router.num_groups = router.group_topk = 0;
      }
    }
  }

  /// One table of angles from an object in the 4.x or 5.x spelling; `top` has what 4.x keeps outside.
  RopeConfig rope_from(const std::optional<Fields>& scaling, double theta, double partial) const {
    RopeConfig rope;
    rope.base = scaling ? scaling->real({"rope_theta"}).value_or(theta) : theta;
    const auto kind = scaling ? scaling->text({"rope_type", "type"}, "default") : std::string("default");
    if (scaling) partial = scaling->real({"partial_rotary_factor"}).value_or(partial);
    if (turns_whole_heads()) {
      shard::require(partial == 1 || kind == "default" || kind == "mrope", Code::BadFormat,
                     [&] { return fmt::format("{}: partial_rotary_factor is {} beside rope_type '{}'; {} turns whole heads", all_.where(), partial, kind, type_); });
      partial = 1;
    }
    rope.dim = deepseek() ? out_.qk_pos_emb_head_dim : static_cast<Index>(static_cast<double>(out_.kv_channels) * partial);
    rope.interleaved = deepseek() && (type_ == "deepseek_v2" || all_.flag("rope_interleave", true));
    rope.type = RopeConfig::Type::Default;
    if (kind == "default" || kind == "mrope") return rope;
    const auto positions = static_cast<double>(out_.max_position_embeddings);
    const auto original = scaling->real({"original_max_position_embeddings"}).value_or(all_.real({"original_max_position_embeddings"}).value_or(positions));
    const auto factor = scaling->real({"factor"});
    rope.original_max_position = original;
    rope.factor = factor.value_or(kind == "yarn" ? positions / original : 1);
    rope.max_position = positions;
    if (kind == "linear") {
      rope.type = RopeConfig::Type::Linear;
      rope.factor = scaling->positive("factor");
    } else if (kind == "dynamic") {
      rope.type = RopeConfig::Type::Dynamic;
      rope.factor = scaling->positive("factor");
    } else if (kind == "llama3") {
      rope.type = RopeConfig::Type::Llama3;
      rope.factor = scaling->positive("factor");
      rope.low_freq_factor = scaling->positive("low_freq_factor");
      rope.high_freq_factor = scaling->positive("high_freq_factor");
      shard::require(original > 0, Code::BadFormat, [&] { return fmt::format("{}: original_max_position_embeddings is {}; should be positive", scaling->where(), original); });
    } else if (kind == "yarn") {
      rope.type = RopeConfig::Type::Yarn;
      const auto or_default = [&](const char* name, double otherwise) {
        const auto value = scaling->real({name}).value_or(0);
        return value == 0 ? otherwise : value;
      };
      rope.beta_fast = or_default("beta_fast", 32);
      rope.beta_slow = or_default("beta_slow", 1);
      rope.truncate = scaling->flag("truncate", true);
      const auto mscale = scaling->real({"mscale"}).value_or(0), all = scaling->real({"mscale_all_dim"}).value_or(0);
      if (const auto given = scaling->real({"attention_factor"})) rope.concentration = *given;
      else if (mscale != 0 && all != 0) rope.concentration = concentration(rope.factor, mscale) / concentration(rope.factor, all);
      else rope.concentration = concentration(rope.factor, 1);
    } else if (kind == "longrope" || kind == "su") {
      rope.type = RopeConfig::Type::LongRope;
      rope.short_factor = scaling->reals("short_factor");
      rope.long_factor = scaling->reals("long_factor");
      const auto f = factor.value_or(positions / original);
      if (const auto given = scaling->real({"attention_factor"})) rope.concentration = *given;
      else rope.concentration = f <= 1 ? 1 : std::sqrt(1 + std::log(f) / std::log(original));
    } else {
      shard::fail(Code::BadFormat, "{}: rope_type '{}' is not known", all_.where(), kind);
    }
    return rope;
  }

  /// transformers takes the name of 4.x before its own, unless it is empty.
  std::optional<Fields> rope_scaling() const {
    const auto* older = all_.find("rope_scaling");
    return all_.object(older && !older->empty() ? "rope_scaling" : "rope_parameters");
  }

  void rope() {
    if (type_ == "gpt2") return;
    const auto theta = all_.real({"rope_theta", "rotary_emb_base"}).value_or(class_.rope_theta);
    const auto partial = all_.real({"partial_rotary_factor", "rotary_pct"}).value_or(class_.partial);
    if (turns_whole_heads() && partial != 1) out_.notes.push_back(fmt::format("partial_rotary_factor is left out, as transformers does for {}", type_));
    const auto scaling = rope_scaling();
    if (scaling && scaling->has("full_attention")) {
      out_.rope = rope_from(scaling->object("full_attention"), theta, partial);
      const auto sliding = scaling->object("sliding_attention");
      out_.rope_local = rope_from(sliding, 10000, partial);
      return;
    }
    out_.rope = rope_from(scaling, theta, partial);
    if (type_ == "gemma3_text") {
      out_.rope_local = rope_from(std::nullopt, all_.real({"rope_local_base_freq"}).value_or(10000), partial);
    }
  }

  bool slides(Index i) const {
    static const std::set<std::string> listed{"qwen2", "qwen3", "qwen2_moe", "gemma2", "gemma3_text", "gpt_oss"};  // the other classes leave layer_types out
    if (const auto* types = listed.contains(type_) ? all_.find("layer_types") : nullptr) {
      shard::require(types->is_array() && static_cast<Index>(types->size()) == out_.num_layers && (*types)[static_cast<std::size_t>(i)].is_string(), Code::BadFormat,
                     [&] { return fmt::format("{}: layer_types should name the kind of every layer", all_.where()); });
      const auto kind = (*types)[static_cast<std::size_t>(i)].get<std::string>();
      shard::require(kind == "sliding_attention" || kind == "full_attention", Code::BadFormat, [&] { return fmt::format("{}: layer type '{}' is not known", all_.where(), kind); });
      return kind == "sliding_attention";
    }
    const bool wanted = all_.flag("use_sliding_window", false);
    if (type_ == "mistral" || type_ == "mixtral" || type_ == "phi3") return true;
    if (type_ == "qwen2" || type_ == "qwen3") return wanted && i >= all_.integer({"max_window_layers"}).value_or(28);
    if (type_ == "qwen3_moe") return wanted;
    if (type_ == "qwen2_moe") return wanted && i % 2 == 0 && i < all_.integer({"max_window_layers"}).value_or(28);
    if (type_ == "gemma2" || type_ == "gpt_oss") return i % 2 == 0;
    if (type_ == "gemma3_text") return (i + 1) % all_.step({"sliding_window_pattern", "_sliding_window_pattern"}, 6) != 0;
    return false;
  }

  bool has_experts(Index i) const {
    if (out_.num_experts == 0) return false;
    if (type_ == "mixtral" || type_ == "gpt_oss") return true;
    if (deepseek()) return i >= all_.integer({"first_k_dense_replace"}).value_or(type_ == "deepseek_v3" ? 3 : 0);  // transformers leaves moe_layer_freq out
    if (const auto* only = all_.find("mlp_only_layers"); only && only->is_array())
      for (const auto& layer : *only)
        if (layer.is_number_integer() && layer.get<Index>() == i) return false;
    return (i + 1) % all_.step({"decoder_sparse_step"}, 1) == 0;
  }

  double softmax_scale(Index i) const {
    if (type_ == "gemma2" || type_ == "gemma3_text") return 1 / std::sqrt(all_.real({"query_pre_attn_scalar"}).value_or(256));
    if (deepseek()) {
      const auto scale = 1 / std::sqrt(static_cast<double>(out_.qk_head_dim + out_.qk_pos_emb_head_dim));
      const auto scaling = rope_scaling();
      if (!scaling || scaling->text({"rope_type", "type"}, "default") == "default") return scale;
      const auto all = scaling->real({"mscale_all_dim"}).value_or(0);
      const auto m = all != 0 ? concentration(scaling->real({"factor"}).value_or(1), all) : 1;
      return scale * m * m;
    }
    auto scale = 1 / std::sqrt(static_cast<double>(out_.kv_channels));
    if (type_ == "gpt2") {
      if (!all_.flag("scale_attn_weights", true)) scale = 1;
      if (all_.flag("scale_attn_by_inverse_layer_idx")) scale /= static_cast<double>(i + 1);
    }
    return scale;
  }

  void layers() {
    static const std::set<std::string> windowed{"gemma2", "gemma3_text", "gpt_oss"};
    const auto otherwise = type_ == "gemma2" || type_ == "gemma3_text" ? 4096 : type_ == "gpt_oss" ? 128 : 0;
    const auto window = windowed.contains(type_) ? all_.integer({"sliding_window"}).value_or(otherwise) : all_.integer({"sliding_window"}).value_or(0);
    for (Index i = 0; i < out_.num_layers; ++i) {
      shard::LayerConfig layer;
      const bool sliding = slides(i);
      if (sliding && window > 0) layer.window = window;
      layer.rope = out_.rope.type != RopeConfig::Type::None;
      layer.local_rope = type_ == "gemma3_text" && sliding;
      layer.moe = has_experts(i);
      layer.softmax_scale = softmax_scale(i);
      out_.layers.push_back(layer);
    }
  }

  Fields all_;
  std::string type_;
  Class class_{};
  TransformerConfig out_;
};

}  // namespace

bool knows_model(const json& config) {
  const auto type = config.is_object() && config.contains("model_type") && config["model_type"].is_string() ? config["model_type"].get<std::string>() : std::string();
  return std::any_of(std::begin(kClasses), std::end(kClasses), [&](const Class& c) { return type == c.type; });
}

TransformerConfig hf_model_config(const json& config, std::string_view where) {
  shard::require(config.is_object(), Code::BadFormat, [&] { return fmt::format("{}: should be an object", where); });
  return Reader(config, where).read();
}

}  // namespace formats
