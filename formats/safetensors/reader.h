// A folder of safetensors files (or one) as a checkpoint whose keys are their own logical names.
#pragma once

#include "formats/checkpoint.h"

namespace formats::safetensors {

/// `path`: a folder with model.safetensors or an index, one .safetensors file, or one .safetensors.index.json.
bool matches(const std::filesystem::path& path);
Checkpoint open(const std::filesystem::path& path, const OpenOptions& options);

}  // namespace formats::safetensors
