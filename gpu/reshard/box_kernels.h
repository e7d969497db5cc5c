// Launches of the three kernels behind BoxList, and what of them the host must know.
#pragma once

#include "gpu/reshard/boxes.h"

namespace gpu::reshard {

constexpr std::uint32_t kUnitsPerBlock = 1024;  ///< of runs and casts
constexpr std::uint32_t kTile = 64;             ///< elements of a tile's side
constexpr std::uint32_t kCastUnit = 4;          ///< elements that a thread casts at once

struct Launch {
  const BoxEntry* entries;  ///< in device memory
  std::uint32_t count;
  const std::byte* from;
  std::byte* to;
};
void launch_runs(const Launch& boxes, std::uint64_t blocks, StreamView on);
void launch_casts(const Launch& boxes, std::uint64_t blocks, StreamView on);
void launch_tiles(const Launch& boxes, std::uint64_t blocks, StreamView on);

}  // namespace gpu::reshard
