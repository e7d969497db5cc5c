// A plan cut into batches that fit a device's buffers: which bytes are read to where, what boxes move them, where they are written.
// Integers only.
#pragma once

#include "gpu/reshard/boxes.h"
#include "libshard/bands.h"
#include "libshard/plan.h"
#include "libshard/scan.h"

#include <functional>
#include <vector>

namespace gpu::reshard {

/// Bytes of a stream that lie together, and where they lie in an image.
struct Segment {
  std::uint32_t stream;
  std::uint64_t offset, bytes, at;
};

/// Bytes that are written as they were read.
struct Straight {
  Segment read;  ///< in the source image
  std::uint32_t to_stream;
  std::uint64_t to;
};

/// A tile of a comparison: `bytes` packed at `a` and at `b` of the target image.
struct Compared {
  std::size_t comparison;
  std::uint64_t first;  ///< number of its first element
  std::uint64_t a, b, bytes;
  shard::DType dtype;
};

/// A part of a scan's task: bytes together in the source image, or a tile packed in the target image.
struct Scanned {
  std::size_t task;
  std::uint64_t at, bytes;
  shard::DType dtype;
  std::uint64_t before;              ///< bytes of the shard's row-major order before its first
  std::vector<shard::TileDim> dims;   ///< of a tile; none: bytes follow each other
  std::vector<shard::Index> extent;
};

/// What a device does at once: fills a source image, moves boxes to a target image, sums, compares, writes.
struct Batch {
  std::vector<Segment> reads, writes;
  std::vector<Segment> sums;     ///< parts of the source image that are long enough for a sum of their own
  std::vector<Straight> straight;
  std::vector<Compared> compared;
  std::vector<Scanned> scanned;
  BoxList boxes;
  std::uint64_t from_bytes = 0, to_bytes = 0;  ///< of the images
  std::uint64_t moved = 0;       ///< source bytes of the plan
  bool empty() const { return reads.empty(); }
  void clear() { *this = {}; }
};

/// A piece of work that one worker turns into batches.
struct Unit {
  enum class Kind { Contiguous, Rows, Tiles, Compare } kind;
  std::size_t index;             ///< of the copy, group or comparison
  std::uint64_t begin, end;      ///< bytes, rows or turns of the outermost dimension
  std::uint32_t stream;          ///< where the bytes go
  std::uint64_t offset;
};

/// Takes a batch, and empties it, whenever nothing more fits.
using Full = std::function<void(Batch&)>;

/// Adds a scan's task to `open`, in images of `image` bytes.
void expand(const shard::ScanTask& task, std::size_t number, std::uint64_t image, Batch& open, const Full& full);

class Batches {
 public:
  /// `image`: bytes that either image of a batch may take, at least 64 KiB. Keeps a reference to the plan.
  Batches(const shard::Plan& plan, std::uint64_t image);
  /// By target file position; comparisons last. Contiguous ones may go another way altogether.
  const std::vector<Unit>& units() const { return units_; }
  const shard::Copy& copy(const Unit& unit) const { return unit.kind == Unit::Kind::Compare ? plan_.comparisons[unit.index].copy : copies_[unit.index]; }
  /// Adds a unit to `open`.
  void expand(const Unit& unit, Batch& open, const Full& full) const;

 private:
  void add_copy(std::size_t index);
  void add_group(std::size_t index);
  void contiguous(const Unit& unit, Batch& open, const Full& full) const;
  void rows(const Unit& unit, Batch& open, const Full& full) const;
  void tiles(const shard::Copy& copy, const Unit& unit, Batch& open, const Full& full) const;
  void compare(const Unit& unit, Batch& open, const Full& full) const;

  const shard::Plan& plan_;
  std::uint64_t image_;
  std::vector<shard::Copy> copies_;  ///< the plan's, and what of its groups is too wide for an image
  std::vector<shard::Group> groups_;
  std::vector<Unit> units_;
};

}  // namespace gpu::reshard
