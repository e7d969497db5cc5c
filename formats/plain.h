// Checkpoints without a model family: every key is its own tensor. Plain DCP, safetensors, and one torch file.
#pragma once

#include "formats/target.h"

namespace formats {

/// One torch.save file; its tensors by their path in the pickled object.
Checkpoint open_torch_file(const std::filesystem::path& path, const OpenOptions& options);

/// Takes out what --drop names.
void drop_tensors(Checkpoint& checkpoint, const OpenOptions& options);

/// Same keys, one chunk a tensor.
void create_dcp(const std::filesystem::path& path, const Checkpoint& source, const TargetOptions& options, Target& target);
void create_safetensors(const std::filesystem::path& path, const Checkpoint& source, const TargetOptions& options, Target& target);

}  // namespace formats
