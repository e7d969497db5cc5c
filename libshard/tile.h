// How a strided copy is cut into tiles that fit a buffer, and how one tile lies in a stream and in memory.
#pragma once

#include "libshard/plan.h"
#include "libshard/strided.h"

#include <cstdint>
#include <vector>

namespace shard {

/// One dimension of a copy in elements: the steps and the run alike.
struct TileDim {
  Index count;
  Index from, to;  ///< bytes per element step at each end
};

/// The dimensions of a copy in target order, the run (if longer than an element) last.
std::vector<TileDim> tile_dims(const Copy& copy);

/// Extents per dimension whose product is at most `elements`, long along both ends' contiguous dimensions.
std::vector<Index> tile_extent(const std::vector<TileDim>& dims, Index elements);

/// One end of one tile, as byte runs of a stream.
struct EndRuns {
  std::uint64_t run;                ///< contiguous bytes
  std::vector<MemoryStep> outer;    ///< loops over the runs: `from` in the stream, `to` packed in memory
  std::uint64_t span;               ///< bytes from the first to the last one, inclusive
  std::vector<Index> strides;       ///< bytes per step of each dimension in the stream
  std::vector<Index> packed;        ///< and once the runs are packed one behind the other
};

/// Bytes from a tile's first element to its `packed`th, where the target has them.
std::uint64_t target_offset(const std::vector<TileDim>& dims, const std::vector<Index>& extent, std::uint64_t packed);

/// Dimensions of stride 0 (a repeated row) are read once.
EndRuns end_runs(const std::vector<TileDim>& dims, const std::vector<Index>& extent, bool source, Index item);

}  // namespace shard
