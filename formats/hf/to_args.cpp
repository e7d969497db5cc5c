// config.json as Megatron's args: the family's constants and fields, then what one value decides for several.
#include "formats/hf/hf.h"
#include "formats/hf/layer_rules.h"
#include "formats/hf/same_model.h"
#include "formats/hf_config.h"
#include "formats/megatron/model_config.h"
#include "libshard/error.h"

#include <algorithm>
#include <cmath>
#include <set>

namespace formats::hf {
namespace {

using Json = nlohmann::ordered_json;
using pickle::Graph;
using pickle::Ref;
using shard::Index;

/// Args that are numbers, of whose fields no size of the model speaks.
constexpr const char* kNumbers[] = {"norm_epsilon", "init_method_std", "attention_dropout", "hidden_dropout", "moe_aux_loss_coeff", "moe_router_topk", "moe_router_topk_scaling_factor", "activation_func_clamp_value"};

template <typename Value>
Ref node_of(Graph& g, const Value& value) {
  if (value.is_boolean()) return g.boolean(value.template get<bool>());
  if (value.is_number_integer()) return g.integer(value.template get<std::int64_t>());
  if (value.is_number()) return g.real(value.template get<double>());
  if (value.is_string()) return g.text(value.template get<std::string>());
  if (value.is_array()) {
    std::vector<Ref> items;
    for (const auto& item : value) items.push_back(node_of(g, item));
    return g.list(items);
  }
  return g.none();
}

class Namespace {
 public:
  Namespace(Graph& g) : g_(g), dict_(g.dict({})) {}
  void put(const std::string& name, Ref value) { g_.set(dict_, name, value); }
  void put(const std::string& name, Index value) { put(name, g_.integer(value)); }
  void flag(const std::string& name, bool value) { put(name, g_.boolean(value)); }
  void real(const std::string& name, double value) { put(name, g_.real(value)); }
  void text(const std::string& name, std::string_view value) { put(name, g_.text(value)); }
  Ref finish() {
    const auto out = g_.object(g_.symbol("argparse", "Namespace"), g_.empty_tuple(), true);
    g_.set_state(out, dict_);
    return out;
  }
  Graph& graph() { return g_; }

 private:
  Graph& g_;
  Ref dict_;
};

class Builder {
 public:
  Builder(const Checkpoint& source, Graph& g, std::vector<std::string>& notes)
      : source_(source), family_(source.hf->family), config_(with_defaults(family_, source.hf->config)), params_(source.params), args_(g), notes_(notes) {}

  Ref build() {
    for (const auto& [name, value] : family_.args.items()) args_.put(name, node_of(args_.graph(), value));
    for (const auto& [name, arg] : family_.fields.items())
      if (const auto* value = arg.is_string() ? field(config_, name.c_str()) : nullptr) {
        const bool numeric = std::any_of(std::begin(kNumbers), std::end(kNumbers), [&, &to = arg](const char* one) { return to == one; });
        shard::require(!numeric || value->is_number(), shard::Code::BadFormat, [&, &from = name] { return fmt::format("config.json: {} is {}; should be a number", from, value->dump()); });
        args_.put(arg.get<std::string>(), node_of(args_.graph(), *value));
      }
    sizes();
    biases();
    rope();
    window();
    mixture();
    precision();
    activation();
    const auto epsilon = number(config_, "rms_norm_eps", 1e-6);
    if (has("mla") && epsilon != 1e-6) note(fmt::format("epsilon of its own for latent norms, which transformers computes with 1e-06 and Megatron with {}", epsilon));
    auto warnings = family_.warn;
    if (const auto* parallel = field(config_, "use_parallel_residual"); parallel && *parallel == false) std::erase(warnings, "parallel residual");
    for (const auto& what : warnings) note(what);
    told_.merge(parts_of_warnings(warnings));
    const auto args = args_.finish();
    refuse_another_model(args);
    return args;
  }

 private:
  bool has(const char* name) const { return shard::holds(name, params_); }
  Index size(const char* name) const { return params_.contains(name) ? params_.find(name)->second : 0; }
  void note_rope(const std::string& what) { note(what), told_.insert("rope"); }
  void note(const std::string& what) { notes_.push_back(fmt::format("Megatron-Core's own forward has no {}; the weights are converted as they are", what)); }

  /// The fusion of bias and GELU is all by which args tell its tanh form from erf.
  void activation() {
    if (!family_.args.contains("bias_gelu_fusion")) return;
    const auto* name = field(config_, config_.contains("activation_function") ? "activation_function" : "hidden_act");
    if (!name || !name->is_string()) return;
    const bool erf = *name == "gelu" || *name == "gelu_python";
    args_.flag("bias_gelu_fusion", !erf);
    args_.flag("openai_gelu", !erf);
  }

  /// What Megatron would compute by these args must be what transformers computes by config.json, but for what was noted.
  void refuse_another_model(Ref args) {
    const auto config = nlohmann::json::parse(source_.hf->config.dump());
    if (!knows_model(config)) return;
    const auto theirs = hf_model_config(config, (source_.hf->folder / "config.json").string());
    const auto ours = megatron::model_config(args_.graph(), args, params_, source_.vocab);
    for (const auto& found : differences(ours, theirs)) {
      const bool rope = found.part.starts_with("rope ") && told_.contains("rope");
      shard::require(rope || told_.contains(found.part), shard::Code::Mismatch, [&] {
        return fmt::format("{}: {}{} is {}; Megatron's args can only say {}", (source_.hf->folder / "config.json").string(), found.where, found.part, found.hugging_face, found.megatron);
      });
    }
  }

  void sizes() {
    args_.put("num_layers", source_.sizes.layers);
    args_.put("hidden_size", size("hidden"));
    args_.put("ffn_hidden_size", size("ffn"));
    args_.put("num_attention_heads", size("heads"));
    if (!has("mla")) {
      args_.flag("group_query_attention", size("groups") != size("heads"));
      args_.put("num_query_groups", size("groups") != size("heads") ? size("groups") : 1);
      args_.put("kv_channels", size("head"));
    } else {
      args_.put("kv_channels", size("hidden") / std::max<Index>(size("heads"), 1));
    }
    if (source_.vocab) args_.put("vocab_size", *source_.vocab);
    args_.put("make_vocab_size_divisible_by", params_.contains("vocab_multiple") ? size("vocab_multiple") : 128);
    args_.put("max_position_embeddings", size("positions"));
    args_.put("seq_length", size("positions"));
    args_.flag("add_position_embedding", true);
    args_.flag("untie_embeddings_and_output_weights", !source_.tied.value_or(false));
    for (const auto& [name, arg] : family_.fields.items())
      if (arg == "norm_epsilon") args_.real("layernorm_epsilon", number(config_, name.c_str(), number(family_.defaults, name.c_str(), 1e-5)));
    args_.text("transformer_impl", "transformer_engine");
    args_.text("tokenizer_type", "HuggingFaceTokenizer");
    if (!family_.fields.contains("hidden_dropout") && !family_.fields.contains("resid_pdrop")) args_.real("hidden_dropout", 0.0);
    args_.flag("qk_layernorm", has("qk_norm") || has("mla"));
    if (size("mtp") > 0) args_.put("mtp_num_layers", size("mtp"));
  }

  void biases() {
    const bool all = has("out_bias") || has("mlp_bias");
    args_.flag("add_bias_linear", all);
    args_.flag("add_qkv_bias", all || has("qkv_bias"));
    if (!all) args_.flag("bias_gelu_fusion", false), args_.flag("bias_swiglu_fusion", true);
  }

  void rope() {
    if (has("learned_positions")) return;
    const auto rope = rope_of(family_, config_);
    if (rope.base == std::floor(rope.base)) args_.put("rotary_base", static_cast<Index>(rope.base));
    else args_.real("rotary_base", rope.base);
    args_.real("rotary_percent", rope.percent);
    const auto factor = number(rope.scaling, "factor", 1);
    const auto original = number(rope.scaling, "original_max_position_embeddings", number(config_, "original_max_position_embeddings", rope.type == "yarn" ? static_cast<double>(size("positions")) : 0));
    const auto is = [&](const char* name) { return rope.type == name; };
    args_.flag("use_rope_scaling", is("llama3"));
    if (has("mla")) {
      args_.text("rope_type", is("yarn") ? "yarn" : "rope");
      args_.real("rotary_scaling_factor", is("yarn") ? factor : 1.0);
      args_.real("mscale", number(rope.scaling, "mscale", 1));
      args_.real("mscale_all_dim", number(rope.scaling, "mscale_all_dim", 0));
      const bool usual = original == 4096 && number(rope.scaling, "beta_fast", 32) == 32 && number(rope.scaling, "beta_slow", 1) == 1;
      if (is("yarn") && !usual) note_rope("yarn constants other than 4096, 32 and 1 for latent attention");
      if (!is("yarn") && !is("default")) note_rope(fmt::format("'{}' rope scaling for latent attention", rope.type));
    } else if (is("llama3")) {
      args_.real("rope_scaling_factor", factor);
      const bool usual = number(rope.scaling, "low_freq_factor", 1) == 1 && number(rope.scaling, "high_freq_factor", 4) == 4 && (original == 8192 || original == 0);
      if (!usual) note_rope("llama3 rope constants other than 1, 4 and 8192");
    } else if (is("yarn")) {
      args_.text("position_embedding_type", "yarn");
      args_.real("rotary_scaling_factor", factor);
      args_.put("yarn_original_max_position_embeddings", static_cast<Index>(original));
      args_.real("yarn_beta_fast", number(rope.scaling, "beta_fast", 32));
      args_.real("yarn_beta_slow", number(rope.scaling, "beta_slow", 1));
      args_.real("mscale", number(rope.scaling, "mscale", 1));
      args_.real("mscale_all_dim", number(rope.scaling, "mscale_all_dim", 0));
      const auto* truncate = field(rope.scaling, "truncate");
      args_.flag("yarn_correction_range_round_to_int", !truncate || *truncate != false);
    } else if (is("linear")) {
      args_.real("rotary_seq_len_interpolation_factor", factor);
    } else if (!is("default")) {
      note_rope(fmt::format("'{}' rope scaling", rope.type));
    }
  }

  void window() {
    const auto layers = source_.sizes.layers;
    const auto window = window_of(family_, config_, layers);
    if (!window) return;
    auto& g = args_.graph();
    args_.put("window_size", g.tuple({g.integer(window->size - 1), g.integer(0)}));
    const auto every = [&](Index n) {
      for (Index i = 0; i < layers; ++i)
        if (window->slides[static_cast<std::size_t>(i)] != ((i + 1) % n != 0)) return false;
      return true;
    };
    if (std::find(window->slides.begin(), window->slides.end(), false) == window->slides.end()) return;
    for (Index n = 2; n <= layers; ++n)
      if (every(n)) return args_.put("window_attn_skip_freq", n);
    std::vector<Ref> list;
    for (const bool slides : window->slides) list.push_back(g.integer(slides ? 1 : 0));
    args_.put("window_attn_skip_freq", g.list(list));
  }

  void mixture() {
    if (!has("experts")) return;
    auto& g = args_.graph();
    args_.put("num_experts", size("experts"));
    args_.put("moe_ffn_hidden_size", size("expert_ffn"));
    if (size("shared_ffn") > 0) args_.put("moe_shared_expert_intermediate_size", size("shared_ffn"));
    std::vector<Ref> list;
    bool every = true;
    for (Index l = 0; l < source_.sizes.layers; ++l) {
      const bool sparse = source_.logical.tensors.contains(fmt::format("layers.{}.mlp.router.weight", l));
      every &= sparse;
      list.push_back(g.integer(sparse ? 1 : 0));
    }
    args_.put("moe_layer_freq", every ? g.integer(1) : g.list(list));
    if (const auto* normal = field(config_, "norm_topk_prob"); normal && !family_.args.contains("moe_router_pre_softmax")) args_.flag("moe_router_pre_softmax", *normal == false);
    const auto groups = static_cast<Index>(number(config_, "n_group", 0)), chosen = static_cast<Index>(number(config_, "topk_group", 0));
    const auto* method = field(config_, "topk_method");
    if (groups > 1 && (has("expert_bias") || !(method && *method == "greedy"))) {  // DeepSeek V3's class knows one method
      args_.put("moe_router_num_groups", groups);
      args_.put("moe_router_group_topk", chosen);
      const auto per_group = chosen > 0 ? static_cast<Index>(number(config_, "num_experts_per_tok", 0)) / chosen : 0;
      if (has("expert_bias") ? per_group != 2 : per_group != 1) note("expert groups scored as this model scores them"), told_.insert("score of expert groups");
    }
  }

  void precision() {
    const auto found = source_.logical.tensors.find("embedding.word.weight");
    if (found == source_.logical.tensors.end()) return;
    const auto dtype = found->second.dtype;
    args_.flag("bf16", dtype == shard::DType::BF16);
    args_.flag("fp16", dtype == shard::DType::F16);
    const char* name = dtype == shard::DType::BF16 ? "bfloat16" : dtype == shard::DType::F16 ? "float16" : "float32";
    args_.put("params_dtype", args_.graph().symbol("torch", name));
  }

  const Checkpoint& source_;
  const Family& family_;
  Json config_;
  const shard::Params& params_;
  Namespace args_;
  std::vector<std::string>& notes_;
  std::set<std::string> told_;  ///< parts of the forward pass that a note speaks of
};

}  // namespace

Ref args_of(const Checkpoint& source, Graph& graph, std::vector<std::string>& notes) { return Builder(source, graph, notes).build(); }

}  // namespace formats::hf
