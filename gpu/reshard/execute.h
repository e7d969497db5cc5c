// Carrying out a plan on a device: the same bytes as shard::execute() writes.
#pragma once

#include "libshard/execute.h"

namespace gpu::reshard {

struct Options {
  std::vector<int> devices{0};      ///< workers take them in turn
  std::uint64_t device_memory = 0;  ///< bytes that buffers may take on each; 0: a quarter of what is free
  bool direct = true;               ///< GPUDirect Storage, where it works
};

struct Sizes {
  unsigned lanes = 0;               ///< batches under way at once, each on a stream of its own
  unsigned devices = 0;             ///< that have lanes
  std::uint64_t image = 0, pinned_memory = 0, device_memory = 0;  ///< bytes: of a lane's image; of all lanes
};

struct Outcome {
  shard::Report report;
  std::string storage;              ///< how bytes came and went: "GPUDirect Storage …" or "pinned memory: why"
  Sizes sizes;
};

/// `budget.memory` bounds pinned memory. Throws Device where the device fails or its memory is too small, else as shard::execute().
Outcome execute(const shard::Plan& plan, const shard::Reader& from, shard::Writer& to, const shard::Kernels& kernels, const shard::Budget& budget,
                const Options& options, const shard::Progress& tell = {});

}  // namespace gpu::reshard
