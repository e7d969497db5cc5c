// Names are Megatron's; older spellings are read, never written.
#include "formats/megatron/args.h"

#include "libshard/error.h"
#include "libshard/families/megatron.h"

#include <algorithm>
#include <array>

namespace formats::megatron {
namespace {

using pickle::Graph;
using pickle::Kind;
using pickle::Ref;
using shard::Index;

std::string letters_of(std::string_view word) {
  if (word == "embedding") return "E";
  if (word == "decoder") return "t";
  if (word == "mtp") return "m";
  if (word == "loss") return "L";
  return std::string(word);
}

bool allowed(const Graph& g, Ref symbol, Audience audience) {
  const auto module = g.module(symbol);
  for (const auto* known : {"torch", "argparse", "collections", "builtins", "__builtin__", "_codecs"})
    if (module == known) return true;
  return audience == Audience::Megatron && (module == "signal" || module == "types" || module == "pathlib" || g.name(symbol) == "AttnBackend");
}

constexpr std::array kShaping = std::to_array<std::string_view>({
    "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split", "activation_func_clamp_value", "add_bias_linear",
    "add_position_embedding", "add_qkv_bias", "apply_layernorm_1p", "apply_residual_connection_post_layernorm", "attention_output_gate",
    "beta_fast", "beta_slow", "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers", "disable_bias_linear",
    "expert_tensor_parallel_size", "ffn_hidden_size", "gated_linear_unit", "glu_linear_offset", "group_query_attention", "hidden_size",
    "hybrid_layer_pattern", "hybrid_override_pattern", "is_hybrid_model", "kv_channels", "kv_lora_rank", "layernorm_epsilon",
    "layernorm_zero_centered_gamma", "make_vocab_size_divisible_by", "max_position_embeddings", "moe_ffn_hidden_size", "moe_layer_freq",
    "moe_router_enable_expert_bias", "moe_router_group_topk", "moe_router_num_groups", "moe_router_pre_softmax",
    "moe_router_score_function", "moe_router_topk", "moe_router_topk_scaling_factor", "moe_shared_expert_gate",
    "moe_shared_expert_intermediate_size", "mscale", "mscale_all_dim", "mtp_num_layers", "mtp_use_repeated_layer", "multi_latent_attention",
    "mup_attn_scale_power", "mup_base_head_dim", "mup_base_hidden_size", "mup_embedding_mult", "mup_output_mult", "no_rope_freq",
    "norm_epsilon", "normalization", "num_attention_heads", "num_experts", "num_layers", "num_query_groups", "openai_gelu",
    "original_max_position_embeddings", "padded_vocab_size", "params_dtype", "pipeline_model_parallel_layout", "position_embedding_type",
    "q_lora_rank", "qk_head_dim", "qk_l2_norm", "qk_layernorm", "qk_pos_emb_head_dim", "quick_geglu", "rope_scaling_factor", "rope_type",
    "rotary_base", "rotary_interleaved", "rotary_percent", "rotary_scaling_factor", "rotary_seq_len_interpolation_factor", "softmax_scale",
    "softmax_type", "squared_relu", "swiglu", "transformer_impl", "untie_embeddings_and_output_weights", "use_mup", "use_rope_scaling",
    "use_tp_pp_dp_mapping", "v_head_dim", "vocab_size", "window_attn_skip_freq", "window_size", "world_size", "yarn_beta_fast",
    "yarn_beta_slow", "yarn_correction_range_round_to_int", "yarn_mscale", "yarn_mscale_all_dim", "yarn_original_max_position_embeddings",
    "yarn_rotary_scaling_factor"});
static_assert(std::ranges::is_sorted(kShaping));

bool is_listed(const Graph& g, Ref value) { return g.kind(value) == Kind::List || g.kind(value) == Kind::Tuple; }

/// A value as text; what is neither number, text nor a list of such is told by its class.
void add_text(const Graph& g, Ref value, std::string& out, std::size_t& left, int depth = 0) {
  constexpr std::size_t kLongest = 1 << 16;
  if (out.size() > kLongest || left == 0) return;
  --left;
  const auto kind = g.kind(value);
  if (kind == Kind::Text) out += g.text(value).substr(0, kLongest);
  else if (kind == Kind::Bool) out += g.boolean(value) ? "True" : "False";
  else if (kind == Kind::Int) out += std::to_string(g.integer(value));
  else if (kind == Kind::Float) out += fmt::format("{}", g.real(value));
  else if (kind == Kind::Symbol) out += g.name(value);
  else if (kind == Kind::Object && depth < 4) {
    add_text(g, g.callable(value), out, left, depth + 1);
    add_text(g, g.args(value), out, left, depth + 1);
  } else if (is_listed(g, value) && depth < 4) {
    out += '[';
    for (const auto item : g.items(value)) {
      if (out.size() > kLongest || left == 0) break;
      if (out.back() != '[') out += ", ";
      add_text(g, item, out, left, depth + 1);
    }
    out += ']';
  }
}

/// Sizes that keys showed or that were given by hand: a target without them could not be opened.
void add_sizes(Graph& to, Ref dict, const shard::Params& sizes) {
  const auto lacks = [&](const char* name) {
    const auto found = to.find(dict, name);
    return !found || to.is_none(*found);
  };
  const auto size = [&](const char* name) {
    const auto found = sizes.find(name);
    return found == sizes.end() ? 0 : found->second;
  };
  const auto fill = [&](const char* name, Index value, bool wanted = true) {
    if (wanted && value > 0 && lacks(name)) to.set(dict, name, to.integer(value));
  };
  fill("num_layers", size("layers"));
  fill("hidden_size", size("hidden"));
  fill("ffn_hidden_size", size("ffn"));
  fill("num_attention_heads", size("heads"));
  fill("kv_channels", size("head"), size("head") * size("heads") != size("hidden"));
  fill("max_position_embeddings", size("positions"));
  fill("num_experts", size("experts"));
  fill("moe_ffn_hidden_size", size("expert_ffn"), size("experts") > 0 && size("expert_ffn") != size("ffn"));
  if (lacks("group_query_attention") && size("groups") != size("heads")) {
    to.set(dict, "group_query_attention", to.boolean(true));
    to.set(dict, "num_query_groups", to.integer(size("groups")));
  }
  const auto set = [&](const char* name) { return !lacks(name) && to.kind(*to.find(dict, name)) == Kind::Bool && to.boolean(*to.find(dict, name)); };
  if (size("gated") && lacks("swiglu") && !set("quick_geglu") && !set("gated_linear_unit")) to.set(dict, "swiglu", to.boolean(true));
}

}  // namespace

std::optional<Ref> Args::value(std::string_view name) const {
  if (graph_.kind(space_) != Kind::Object) return std::nullopt;
  const auto found = graph_.attribute(space_, name);
  return found && !graph_.is_none(*found) ? found : std::nullopt;
}

std::optional<Index> Args::integer(std::string_view name) const {
  const auto found = value(name);
  if (!found) return std::nullopt;
  if (graph_.kind(*found) == Kind::Float) return static_cast<Index>(graph_.real(*found));
  if (graph_.kind(*found) != Kind::Int && graph_.kind(*found) != Kind::Bool) return std::nullopt;
  return graph_.integer(*found);
}

bool Args::flag(std::string_view name) const { return integer(name).value_or(0) != 0; }

std::optional<std::string> Args::text(std::string_view name) const {
  const auto found = value(name);
  if (!found || graph_.kind(*found) != Kind::Text) return std::nullopt;
  return std::string(graph_.text(*found));
}

shard::Params params_of(const Args& args, const std::map<std::string, Index>& given) {
  shard::Params out;
  const auto take = [&](const char* param, const char* name) {
    if (const auto value = args.integer(name)) out[param] = *value;
  };
  take("layers", "num_layers");
  take("hidden", "hidden_size");
  take("ffn", "ffn_hidden_size");
  take("heads", "num_attention_heads");
  if (args.flag("group_query_attention")) take("groups", "num_query_groups");
  take("head", "kv_channels");
  take("positions", "max_position_embeddings");
  take("experts", "num_experts");
  take("expert_ffn", "moe_ffn_hidden_size");
  take("shared_ffn", "moe_shared_expert_intermediate_size");
  take("mtp", "mtp_num_layers");
  take("vocab_multiple", "make_vocab_size_divisible_by");
  const auto set = [&](const char* param, bool value) { out[param] = value ? 1 : 0; };
  const bool biased = args.value("add_bias_linear") ? args.flag("add_bias_linear") : args.value("disable_bias_linear") ? !args.flag("disable_bias_linear") : false;
  set("mlp_bias", biased);
  set("qkv_bias", biased || args.flag("add_qkv_bias"));
  set("layernorm", args.text("normalization").value_or("LayerNorm") == "LayerNorm");
  set("gated", args.flag("swiglu") || args.flag("quick_geglu") || args.flag("gated_linear_unit"));
  set("squared_relu", args.flag("squared_relu"));
  set("qk_norm", args.flag("qk_layernorm"));
  set("tied", !args.flag("untie_embeddings_and_output_weights"));
  set("learned_positions", args.text("position_embedding_type").value_or("learned_absolute") == "learned_absolute");
  set("expert_bias", args.flag("moe_router_enable_expert_bias"));
  set("shared_gate", args.flag("moe_shared_expert_gate"));
  set("sinks", args.text("softmax_type").value_or("vanilla") == "learnable");
  if (args.flag("multi_latent_attention")) {
    out["mla"] = 1;
    take("q_lora", "q_lora_rank");
    take("kv_lora", "kv_lora_rank");
    take("nope", "qk_head_dim");
    take("rope_dim", "qk_pos_emb_head_dim");
    take("value_head", "v_head_dim");
    out.erase("groups");
  }
  for (const auto& [name, value] : given) out[name] = value;
  constexpr Index kMostExperts = 1 << 16;  // each that is missing would be looked for in every layer
  if (const auto experts = out.find("experts"); experts != out.end() && experts->second > kMostExperts)
    shard::fail(shard::Code::BadFormat, "args.num_experts: is {}; at most {} are taken for real", experts->second, kMostExperts);
  shard::complete(out);
  return out;
}

std::vector<bool> moe_layers_of(const Graph& graph, const Args& args, Index layers) {
  constexpr Index kMostLayers = 100'000;
  std::vector<bool> out;
  if (layers < 1 || layers > kMostLayers) return out;
  if (!args.integer("num_experts")) return std::vector<bool>(static_cast<std::size_t>(layers), false);
  const auto value = args.value("moe_layer_freq");
  if (!value || graph.kind(*value) == Kind::Int) {
    const auto every = value ? graph.integer(*value) : 1;
    for (Index layer = 0; every >= 1 && layer < layers; ++layer) out.push_back(layer % every == 0);
  } else if (is_listed(graph, *value) && static_cast<Index>(graph.items(*value).size()) == layers) {
    for (const auto item : graph.items(*value)) out.push_back(graph.kind(item) == Kind::Int && graph.integer(item) != 0);
  }
  return out;
}

bool non_homogeneous_layers(const Graph& graph, const Args& args) {
  const auto frequency = args.value("moe_layer_freq");
  const bool listed = frequency && is_listed(graph, *frequency);
  return args.flag("hetereogenous_dist_checkpoint") || listed || args.integer("moe_layer_freq").value_or(1) > 1;
}

std::map<std::string_view, std::string> shaping_args(const Graph& g, Ref args) {
  std::map<std::string_view, std::string> out;
  const auto state = g.kind(args) == Kind::Object ? g.state(args) : std::nullopt;
  if (!state || g.kind(*state) != Kind::Dict) return out;
  const auto items = g.items(*state);
  for (std::size_t i = 0; i + 1 < items.size(); i += 2) {
    if (g.kind(items[i]) != Kind::Text || g.is_none(items[i + 1])) continue;
    const auto found = std::lower_bound(kShaping.begin(), kShaping.end(), g.text(items[i]));
    if (found == kShaping.end() || *found != g.text(items[i])) continue;
    auto& text = out[*found];
    text.clear();
    std::size_t left = 1 << 17;  // values to look at: lists that share their items multiply
    if (*found == "pipeline_model_parallel_layout") text = layout_text(g, items[i + 1]);
    else add_text(g, items[i + 1], text, left);
  }
  return out;
}

std::string layout_text(const Graph& g, Ref value) {
  constexpr int kDeepest = 16;            // objects may hold themselves
  constexpr std::size_t kMost = 1 << 20;  // stages, layers and letters together: lists may be shared
  for (int depth = 0; g.kind(value) == Kind::Object; ++depth) {
    shard::require(depth < kDeepest, shard::Code::BadFormat, [&] { return fmt::format("args.pipeline_model_parallel_layout: more than {} objects in one another; should be a text or stages of layers", kDeepest); });
    std::optional<Ref> inner;
    for (const char* name : {"input_data", "layout"})
      if (!inner || g.is_none(*inner)) inner = g.attribute(value, name);
    if ((!inner || g.is_none(*inner)) && !g.items(g.args(value)).empty()) inner = g.items(g.args(value))[0];
    if (!inner) return {};
    value = *inner;
  }
  if (g.kind(value) == Kind::Text) return std::string(g.text(value));
  if (!is_listed(g, value)) return {};
  std::string out;
  bool first = true;
  std::size_t seen = 0;
  const auto count = [&](std::size_t more) {
    seen += more;
    shard::require(seen <= kMost, shard::Code::BadFormat, [&] { return fmt::format("args.pipeline_model_parallel_layout: has more than {} stages and layers", kMost); });
  };
  const auto add = [&](Ref word) {
    count(g.text(word).size());
    out += letters_of(g.text(word));
  };
  for (const auto stage : g.items(value)) {
    count(1);
    if (!first) out += '|';
    first = false;
    if (g.kind(stage) == Kind::Text) {
      add(stage);
      continue;
    }
    count(g.items(stage).size());
    for (const auto layer : g.items(stage)) {
      if (g.kind(layer) == Kind::Text) add(layer);
      else if (g.kind(layer) == Kind::Object && !g.items(g.args(layer)).empty()) {  // a LayerType by number
        static constexpr const char* kLetters[] = {"", "E", "L", "", "t", "m"};
        const auto number = g.items(g.args(layer))[0];
        if (g.kind(number) == Kind::Int && g.integer(number) >= 1 && g.integer(number) <= 5) out += kLetters[g.integer(number)];
        else if (g.kind(number) == Kind::Text) add(number);
      }
    }
  }
  return out;
}

shard::Parallel parallel_of(const Args& args) {
  shard::Parallel out;
  const auto old = args.integer("model_parallel_size");  // before checkpoint version 3
  out.tp = args.integer("tensor_model_parallel_size").value_or(old.value_or(1));
  out.pp = args.integer("pipeline_model_parallel_size").value_or(1);
  out.vpp = args.integer("virtual_pipeline_model_parallel_size").value_or(1);
  out.ep = args.integer("expert_model_parallel_size").value_or(1);
  out.etp = args.integer("expert_tensor_parallel_size").value_or(out.tp);
  out.first_stage_layers = args.integer("decoder_first_pipeline_num_layers");
  out.last_stage_layers = args.integer("decoder_last_pipeline_num_layers");
  out.account_for_embedding = args.flag("account_for_embedding_in_pipeline_split");
  out.account_for_loss = args.flag("account_for_loss_in_pipeline_split");
  if (out.pp == 1) out.first_stage_layers = out.last_stage_layers = std::nullopt;
  return out;
}

Ref copy_args(Graph& to, const Graph& from, Ref args, const ArgsChange& change, Audience audience, std::set<std::string>& dropped) {
  const bool copied = from.kind(args) == Kind::Object && from.state(args) && from.kind(*from.state(args)) == Kind::Dict;
  const auto made = copied ? to.import(from, args) : to.object(to.symbol("argparse", "Namespace"), to.empty_tuple(), true);
  if (!copied) to.set_state(made, to.dict({}));
  const auto dict = *to.state(made);
  if (copied) {
    const auto items = from.items(*from.state(args));
    const auto refused = from.leading_to([&](Ref at) { return from.kind(at) == Kind::Symbol && !allowed(from, at, audience); });
    for (std::size_t i = 0; i + 1 < items.size(); i += 2) {
      if (!refused[items[i + 1]]) continue;
      to.erase(dict, from.text(items[i]));
      dropped.emplace(from.text(items[i]));
    }
  }
  const auto known = [&](const char* name) { return to.find(dict, name).has_value(); };
  const auto put = [&](const char* name, Index value, bool always = true) {
    if (always || known(name)) to.set(dict, name, to.integer(value));
  };
  const auto optional = [&](const char* name, std::optional<Index> value) {
    if (value || known(name)) to.set(dict, name, value ? to.integer(*value) : to.none());
  };
  add_sizes(to, dict, change.sizes);
  const auto& p = change.parallel;
  put("tensor_model_parallel_size", p.tp);
  put("pipeline_model_parallel_size", p.pp);
  put("transformer_pipeline_model_parallel_size", p.pp, false);
  optional("virtual_pipeline_model_parallel_size", p.vpp > 1 ? std::optional(p.vpp) : std::nullopt);
  optional("num_layers_per_virtual_pipeline_stage", std::nullopt);
  optional("num_virtual_stages_per_pipeline_rank", p.vpp > 1 ? std::optional(p.vpp) : std::nullopt);
  put("expert_model_parallel_size", p.ep, p.ep > 1);
  put("expert_tensor_parallel_size", p.etp, p.ep > 1);
  put("expert_tensor_parallel_num_weight_shards", p.etp, false);
  optional("decoder_first_pipeline_num_layers", p.first_stage_layers);
  optional("decoder_last_pipeline_num_layers", p.last_stage_layers);
  if (known("account_for_embedding_in_pipeline_split") || p.account_for_embedding)
    to.set(dict, "account_for_embedding_in_pipeline_split", to.boolean(p.account_for_embedding));
  if (known("account_for_loss_in_pipeline_split") || p.account_for_loss)
    to.set(dict, "account_for_loss_in_pipeline_split", to.boolean(p.account_for_loss));
  if (known("pipeline_model_parallel_layout") || !p.pp_layout.empty())
    to.set(dict, "pipeline_model_parallel_layout", p.pp_layout.empty() ? to.none() : to.text(p.pp_layout));
  if (known("mtp_num_layers")) to.set(dict, "mtp_num_layers", change.mtp_layers > 0 ? to.integer(change.mtp_layers) : to.none());
  put("padded_vocab_size", change.padded_vocab);
  if (change.vocab_multiple) put("make_vocab_size_divisible_by", *change.vocab_multiple);
  if (const auto dtype = change.dtype) {
    if (known("params_dtype")) to.set(dict, "params_dtype", to.symbol("torch", std::string(shard::torch_name(*dtype))));
    if (known("bf16")) to.set(dict, "bf16", to.boolean(*dtype == shard::DType::BF16));
    if (known("fp16")) to.set(dict, "fp16", to.boolean(*dtype == shard::DType::F16));
  }
  put("rank", change.rank);
  put("local_rank", change.rank, false);
  put("world_size", change.world_size);
  put("inprocess_active_world_size", change.world_size, false);
  put("data_parallel_size", change.world_size / (p.tp * p.pp), false);
  if (known("ckpt_format") && !change.ckpt_format.empty()) to.set(dict, "ckpt_format", to.text(change.ckpt_format));
  if (known("use_dist_ckpt") && !change.ckpt_format.empty()) to.set(dict, "use_dist_ckpt", to.boolean(change.ckpt_format != "torch"));
  return made;
}

}  // namespace formats::megatron
