// What a Megatron target holds, whichever of the two formats it has.
#include "formats/megatron/args.h"
#include "formats/megatron/writers.h"
#include "libshard/error.h"
#include "libshard/families/megatron.h"

#include <algorithm>

namespace formats::megatron {
namespace {

using shard::Code;
using shard::Index;

/// The target's padded vocabulary; a note where the true size is not known.
Index padded(const Checkpoint& source, const shard::Parallel& parallel) {
  const auto found = source.logical.tensors.find("embedding.word.weight");
  const Index rows = found == source.logical.tensors.end() || found->second.global_shape.empty() ? 0 : found->second.global_shape[0];
  const auto multiple = source.params.find("vocab_multiple");
  if (multiple == source.params.end() && !source.vocab) return shard::padded_vocab(rows, 1, parallel.tp);
  return shard::padded_vocab(source.vocab.value_or(rows), multiple == source.params.end() ? 128 : multiple->second, parallel.tp);
}

/// Stacked where every layer is spelled by the same rows.
bool one_kind(const std::vector<shard::Wanted>& wanted, Index layers) {
  std::map<Index, std::set<const shard::Row*>> rows;
  for (const auto& one : wanted)
    if (one.row->stage == shard::Stage::Layer) rows[one.match.layer].insert(one.row);
  return static_cast<Index>(rows.size()) == layers &&
         std::all_of(rows.begin(), rows.end(), [&](const auto& entry) { return entry.second == rows.begin()->second; });
}

}  // namespace

Model model_for(const Checkpoint& source, const TargetOptions& options, std::string_view dialects) {
  shard::require(source.megatron.has_value(), Code::Mismatch, [] { return "the source is no Megatron checkpoint: its model family is not known"; });
  const auto& state = *source.megatron;
  const bool keep = options.keep_spelling;
  Model out{{}, shard::Table(shard::megatron_rows(), dialects), source.params, options.parallel, {}, state.layers, state.experts, state.te, false, source.tied.value_or(false)};
  out.pipeline = place_layers(options.parallel, state.layers, state.mtp_layers);  // first: it refuses sizes below 1
  shard::check_tensor_parallel(out.params, options.parallel.tp, options.parallel.etp);
  shard::require(state.experts % options.parallel.ep == 0 && (state.experts > 0 || options.parallel.ep == 1), Code::BadLayout,
                 [&] { return fmt::format("layout: {} experts cannot be divided by expert parallel size {}", state.experts, options.parallel.ep); });
  // Of ranks with the same place among tensor ranks one writes: it should have its own part of the experts.
  shard::require(state.experts == 0 || options.parallel.ep > 1 || options.parallel.tp % options.parallel.etp == 0, Code::BadLayout,
                 [&] { return fmt::format("layout: expert tensor size {} with expert parallel size 1; should divide tensor size {}", options.parallel.etp, options.parallel.tp); });
  out.parallel.vpp = out.pipeline.chunks;
  out.params["vocab"] = padded(source, options.parallel);
  out.params["layers"] = state.layers;
  out.wanted = spell_out(source.logical, out.table, out.params, {keep ? &state.rows : nullptr, state.layers, state.experts, state.mtp_layers});
  if (options.dtype)
    for (auto& one : out.wanted)
      if (is_floating(one.dtype) && !one.key.ends_with("expert_bias")) one.dtype = *options.dtype;
  out.dtype = options.dtype;
  out.stacked = keep ? state.stacked : one_kind(out.wanted, state.layers);
  return out;
}

std::optional<Index> vocab_multiple(const Model& model) {
  const auto found = model.params.find("vocab_multiple");
  return found == model.params.end() ? std::nullopt : std::optional(found->second);
}

std::string iteration_folder(LocalWriter& writer, const Checkpoint& source) {
  const auto tracker = writer.folder().add("latest_checkpointed_iteration.txt");
  const auto text = source.iteration ? std::to_string(*source.iteration) : std::string("release");
  writer.folder().write(tracker, 0, text);
  return source.iteration ? fmt::format("iter_{:07d}/", *source.iteration) : "release/";
}

void describe_logical(Target& target, const Checkpoint& source, const Model& model) {
  std::vector<shard::Finding> findings;
  auto& stored = target.writer->described();
  stored.files = target.writer->folder().names();
  auto translation = to_logical(stored, model.table, model.params, {}, findings);
  refuse(findings);
  target.logical = std::move(translation.logical);
  // A layout whose ranks do not hold the model together would lose weights in silence.
  for (const auto& [key, tensor] : source.logical.tensors)
    shard::require(target.logical.tensors.contains(key), Code::BadLayout, [&] { return fmt::format("layout: no rank would hold {}", key); });
  for (const auto& [key, tensor] : target.logical.tensors) check_cover(tensor, findings, 1);
  shard::require(findings.empty(), Code::BadLayout, [&] { return fmt::format("layout: {}: {}", findings.front().key, findings.front().message); });
}

shard::Chunk chunk_of(const Model& model, const shard::Wanted& wanted) {
  switch (wanted.row->stage) {
    case shard::Stage::Embedding: return model.pipeline.embedding;
    case shard::Stage::Layer: return model.pipeline.of_layer(wanted.match.layer);
    case shard::Stage::FinalNorm: return model.pipeline.final_norm;
    case shard::Stage::Mtp: return model.pipeline.mtp;
    case shard::Stage::Output: return model.pipeline.output;
  }
  return {};
}

std::map<std::string, ExtraState> extra_states(const Checkpoint& source, const Model& model, bool with_defaults) {
  std::map<std::string, ExtraState> out;
  const auto& state = *source.megatron;
  const bool defaults = with_defaults && state.extra.empty();
  for (const auto& one : model.wanted) {
    const auto weight = one.key.rfind(".weight");
    if (weight == std::string::npos) continue;
    const auto module = one.key.substr(0, weight);
    const auto of_expert = [&](Index expert) { return state.extra.find(shard::spell(one.row->parts.front().name, one.match.layer, expert, one.match.depth)); };
    auto found = of_expert(one.match.expert);
    // Grouped experts are one module with one state, of which Megatron gives every expert a copy.
    if (found == state.extra.end() && one.match.expert > 0) found = of_expert(0);
    if (found != state.extra.end() && one.row->stage != shard::Stage::Output) out.try_emplace(module, found->second);
    else if (defaults && shard::has_extra_state(module))
      out[module] = state.te ? ExtraState{ExtraState::Kind::Tensor, {}, nullptr, 0} : ExtraState{};
  }
  return out;
}

pickle::Ref extra_node(pickle::Graph& graph, const ExtraState& extra, const std::string& storage_key) {
  switch (extra.kind) {
    case ExtraState::Kind::None: return graph.none();
    case ExtraState::Kind::Tensor: return tensor_node(graph, shard::DType::U8, storage_key, {static_cast<Index>(extra.bytes.size())});
    case ExtraState::Kind::Object: return graph.import(*extra.graph, extra.ref);
  }
  return graph.none();
}

}  // namespace formats::megatron
