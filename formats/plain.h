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

/// Lays out safetensors files, sharded greedily in this order, and the index where there are several.
void write_safetensors(Target& target, const std::vector<PlainTensor>& tensors, std::uint64_t max_shard_size, std::map<std::string, std::string> metadata);

/// Same keys, one chunk a tensor.
void create_dcp(const std::filesystem::path& path, const Checkpoint& source, const TargetOptions& options, Target& target);
void create_safetensors(const std::filesystem::path& path, const Checkpoint& source, const TargetOptions& options, Target& target);

}  // namespace formats
