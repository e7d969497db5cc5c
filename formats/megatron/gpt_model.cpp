// Args of Megatron-Core 0.12 to 0.20, read once.
#include "formats/megatron/gpt_model.h"

#include "libshard/error.h"
#include "libshard/families/megatron.h"

namespace formats::megatron {
namespace {

using pickle::Kind;
using shard::DType;

/// params_dtype is torch.bfloat16 in a pickle and a text elsewhere.
DType params_dtype(const pickle::Graph& graph, const Args& args) {
  const auto value = args.value("params_dtype");
  if (value && (graph.kind(*value) == Kind::Symbol || graph.kind(*value) == Kind::Text)) {
    const auto name = graph.kind(*value) == Kind::Symbol ? graph.name(*value) : graph.text(*value);
    const auto dtype = shard::dtype_named(name);
    shard::require(dtype.has_value(), shard::Code::Mismatch, [&] { return fmt::format("args.params_dtype: '{}' is no number type", name); });
    return *dtype;
  }
  return args.flag("bf16") ? DType::BF16 : args.flag("fp16") ? DType::F16 : DType::F32;
}

}  // namespace

shard::GptModel gpt_model(const pickle::Graph& graph, const Args& args) {
  shard::GptModel out;
  out.params = params_of(args, {});
  out.params["router_bias"] = out.params["mlp_bias"];  // since 0.13; whoever writes today has it
  for (const auto* needed : {"layers", "hidden", "heads", "head"})
    shard::require(out.params.contains(needed), shard::Code::Mismatch,
                   [&] { return fmt::format("args: do not give '{}': num_layers, hidden_size and num_attention_heads should be there", needed); });
  if (!out.params.contains("ffn")) out.params["ffn"] = 4 * out.params["hidden"];
  shard::complete(out.params);
  const auto tp = parallel_of(args).tp;
  out.params["vocab"] = args.integer("padded_vocab_size")
                            .value_or(shard::padded_vocab(args.integer("vocab_size").value_or(0), args.integer("make_vocab_size_divisible_by").value_or(128), tp));
  out.moe_layers = moe_layers_of(graph, args, out.params["layers"]);
  out.dtype = params_dtype(graph, args);
  out.non_homogeneous_layers = non_homogeneous_layers(graph, args);
  return out;
}

shard::Parallel parallel_with_layout(const pickle::Graph& graph, const Args& args) {
  auto out = parallel_of(args);
  if (const auto layout = args.value("pipeline_model_parallel_layout")) out.pp_layout = layout_text(graph, *layout);
  return out;
}

}  // namespace formats::megatron
