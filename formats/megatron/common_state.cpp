// What goes into common.pt, and what of it is understood.
#include "formats/megatron/common_state.h"

#include "formats/megatron/args.h"
#include "libshard/error.h"
#include "libshard/families/megatron.h"

#include <algorithm>

namespace formats::megatron {
namespace {

using shard::Code;
using shard::Index;

/// Without args, what the keys themselves show.
void guess_params(Checkpoint& out) {
  auto& params = out.params;
  const auto has = [&](std::string_view suffix) {
    return std::any_of(out.stored.tensors.begin(), out.stored.tensors.end(), [&](const auto& entry) { return entry.first.ends_with(suffix); });
  };
  params["tied"] = !out.stored.tensors.contains("output_layer.weight");
  params["layernorm"] = has("layer_norm_bias");
  params["learned_positions"] = has("position_embeddings.weight");
  if (const auto found = out.stored.tensors.find("embedding.word_embeddings.weight");
      found != out.stored.tensors.end() && found->second.global_shape.size() == 2)
    params.try_emplace("hidden", found->second.global_shape[1]);
  if (const auto found = out.stored.tensors.find("embedding.position_embeddings.weight");
      found != out.stored.tensors.end() && found->second.global_shape.size() == 2)
    params.try_emplace("positions", found->second.global_shape[0]);
  shard::complete(params);
}

}  // namespace

void take_common(Checkpoint& out, pickle::Graph graph) {
  auto& state = *out.megatron;
  const auto& g = graph;
  auto top = g.root;
  if (g.kind(top) == pickle::Kind::List && g.items(top).size() == 1) top = g.items(top)[0];
  shard::require(g.kind(top) == pickle::Kind::Dict, Code::BadFormat, [] { return "common state is no dict"; });
  const auto entries = g.items(top);
  for (std::size_t i = 0; i + 1 < entries.size(); i += 2) {
    if (g.kind(entries[i]) != pickle::Kind::Text) continue;
    const std::string key(g.text(entries[i]));
    const auto value = entries[i + 1];
    if (key == "args") state.args = value;
    else if (key == "iteration" && g.kind(value) == pickle::Kind::Int) out.iteration = g.integer(value);
    else if (key == "checkpoint_version") continue;
    else if (key == "num_floating_point_operations_so_far" || key == "content_metadata") state.items[key] = value;
    else {
      out.not_carried.push_back({key, key == "optimizer" ? "optimizer state" : "belongs to the run, not to the weights"});
      if (key == "optimizer") out.needs_weights_only = true;
    }
  }
  state.common = std::make_shared<pickle::Graph>(std::move(graph));
}

void take_args(Checkpoint& out, const OpenOptions& options) {
  auto& state = *out.megatron;
  const Args args(*state.common, state.args);
  out.params = params_of(args, options.parameters);
  if (!args.present()) return guess_params(out);
  out.parallel = parallel_of(args);
  if (const auto layout = args.value("pipeline_model_parallel_layout")) out.parallel->pp_layout = layout_text(*state.common, *layout);
  out.vocab = args.integer("vocab_size");
  if (const auto padded = args.integer("padded_vocab_size")) out.params["padded_vocab"] = *padded;
  if (args.text("transformer_impl").value_or("") != "local") state.te = true;
}

std::string common_pickle(const Checkpoint& source, const Model& model, Target& target) {
  const auto& state = *source.megatron;
  pickle::Graph g(1 << 16);
  const Index world = ranks_per_stage(model.parallel) * model.parallel.pp;
  std::set<std::string> dropped;
  std::vector<pickle::Ref> entries{
      g.text("args"), copy_args(g, *state.common, state.args, {model.parallel, target.padded_vocab, 0, world, "torch_dist", model.pipeline.mtp_layers, vocab_multiple(model), model.dtype, model.params}, Audience::Megatron, dropped),
      g.text("checkpoint_version"), g.real(3.0)};
  if (source.iteration) entries.insert(entries.end(), {g.text("iteration"), g.integer(*source.iteration)});
  for (const auto& [key, value] : state.items) entries.insert(entries.end(), {g.text(key), g.import(*state.common, value)});
  for (const auto& name : dropped) target.dropped.push_back({"args." + name, "its class is not known to every Megatron-Core that reads common.pt"});
  return pickle::write(g, g.dict(entries), 2);
}

}  // namespace formats::megatron
