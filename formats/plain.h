// Checkpoints without a model family: every key is its own tensor. Plain DCP, safetensors, and one torch file.
#pragma once

#include "formats/target.h"

namespace formats {

/// One torch.save file; its tensors by their path in the pickled object.
Checkpoint open_torch_file(const std::filesystem::path& path, const OpenOptions& options);

/// Takes out what --drop names.
void drop_tensors(Checkpoint& checkpoint, const OpenOptions& options);

/// A tensor as a target without cuts will hold it.
struct PlainTensor {
  std::string key;
  shard::DType dtype;
  shard::Shape shape;
  std::uint64_t bytes() const { return static_cast<std::uint64_t>(shard::volume(shape)) * size_of(dtype); }
};

/// The tensors of a target that keeps the source's keys. Throws BadLayout where keys would not be the source's own, or a cut is asked for.
std::vector<PlainTensor> same_keys(const Checkpoint& source, const TargetOptions& options);

/// Completes the target's tensors as the plan joins them with the source's: by logical names where a family speaks for the keys.
void join(const Checkpoint& source, Target& target);

/// Lays out safetensors files, sharded greedily in this order, and the index where there are several.
void write_safetensors(Target& target, const std::vector<PlainTensor>& tensors, std::uint64_t max_shard_size, std::map<std::string, std::string> metadata,
                       const std::string& stem = "model");

/// Same keys, one chunk a tensor.
void create_dcp(const std::filesystem::path& path, const Checkpoint& source, const TargetOptions& options, Target& target);
void create_safetensors(const std::filesystem::path& path, const Checkpoint& source, const TargetOptions& options, Target& target);

}  // namespace formats
