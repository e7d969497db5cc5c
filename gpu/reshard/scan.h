// Looking at every byte of a checkpoint on a device: the same findings as shard::scan_bytes().
#pragma once

#include "gpu/reshard/execute.h"

namespace gpu::reshard {

struct ScanOutcome {
  std::vector<shard::Finding> findings;
  std::string storage;              ///< as Outcome's, or why the CPU had to do it after all
  Sizes sizes;
};

/// Checksums, numbers that are not finite, replicas. Throws as execute().
ScanOutcome scan_bytes(const shard::Reader& from, const shard::ShardedStateDict& stored, const shard::Plan& replicas, const shard::Kernels& kernels,
                       const shard::Budget& budget, const Options& options, const shard::Progress& tell = {});

}  // namespace gpu::reshard
