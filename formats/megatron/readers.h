// Opening the two kinds of Megatron checkpoints.
#pragma once

#include "formats/checkpoint.h"

namespace formats::megatron {

/// `folder/metadata.json` says torch_dist; zarr is refused.
bool is_torch_dist(const std::filesystem::path& folder);
/// A child is named mp_rank_*.
bool is_mp_rank(const std::filesystem::path& folder);

Checkpoint open_torch_dist(const std::filesystem::path& folder, const OpenOptions& options);
Checkpoint open_mp_rank(const std::filesystem::path& folder, const OpenOptions& options);

}  // namespace formats::megatron
