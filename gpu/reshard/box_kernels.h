// Launches of the three kernels behind BoxList, and what of them the host must know.
#pragma once

#include "gpu/reshard/boxes.h"

#include <algorithm>

namespace gpu::reshard {

constexpr std::uint32_t kUnitsPerBlock = 1024;  ///< of runs and casts
/// Elements that a thread casts at once: 16 bytes of the wider type; of f64, 32.
constexpr std::uint32_t cast_unit(unsigned from_size, unsigned to_size) { return std::max(4u, 16 / std::max(from_size, to_size)); }
/// Elements of a tile's side: 128 bytes and more along either end, but for casts of and to fp8.
constexpr std::uint32_t tile_side(unsigned from_size, unsigned to_size) {
  const auto wider = std::max(from_size, to_size);
  return wider == 8 ? 32 : wider == 1 ? 128 : 64;
}

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
