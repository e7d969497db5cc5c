// Moving a tile of elements between two places in memory by strides: the one walk behind every transpose and gather.
#pragma once

#include "libshard/box.h"

#include <cstddef>
#include <vector>

namespace shard {

struct MemoryStep {
  Index count, from, to;  ///< bytes per turn at each end
};

/// Copies `run` bytes per innermost turn; steps are outermost first.
void strided_copy(std::byte* to, const std::byte* from, const std::vector<MemoryStep>& steps, std::size_t run);

}  // namespace shard
