// Laying out the two kinds of Megatron checkpoints.
#pragma once

#include "formats/target.h"

namespace formats::megatron {

/// What both kinds need: the stored tensors that are wanted, in registration order, and the layout they go to.
struct Model {
  std::vector<shard::Wanted> wanted;
  shard::Table table;
  shard::Params params;                   ///< with the target's padded vocabulary as "vocab"
  shard::Parallel parallel;
  shard::Pipeline pipeline;
  shard::Index layers, experts;
  bool te = false, stacked = false, tied = false;
  std::optional<shard::DType> dtype = {}; ///< that floating tensors are cast to
};

Model model_for(const Checkpoint& source, const TargetOptions& options, std::string_view dialects);

void create_mp_rank(const std::filesystem::path& path, const Checkpoint& source, const TargetOptions& options, Target& target);
void create_torch_dist(const std::filesystem::path& path, const Checkpoint& source, const TargetOptions& options, Target& target);

/// What the padded vocabulary is a multiple of, times the tensor parallel size; nullopt where neither args nor options say it.
std::optional<shard::Index> vocab_multiple(const Model& model);

/// "iter_0000010/", or "release/" where there is no iteration; writes the tracker file.
std::string iteration_folder(LocalWriter& writer, const Checkpoint& source);

/// Adds to the target the logical tensors of its stored ones. Throws BadLayout where they are not all of the source's.
void describe_logical(Target& target, const Checkpoint& source, const Model& model);

/// The stage and chunk where a row's tensor of that layer lies.
shard::Chunk chunk_of(const Model& model, const shard::Wanted& wanted);

/// Extra states by module (the key without "._extra_state"): carried from the source, or the spec's own default.
std::map<std::string, ExtraState> extra_states(const Checkpoint& source, const Model& model, bool with_defaults);

/// A node for an extra state; a tensor's bytes are appended as storage `key`.
pickle::Ref extra_node(pickle::Graph& graph, const ExtraState& extra, const std::string& storage_key);

}  // namespace formats::megatron
