// Strided boxes of elements between two images in device memory, any number in a launch: copies, transposes, repeated rows, casts.
#pragma once

#include "gpu/runtime.h"
#include "libshard/tile.h"

#include <array>
#include <vector>

namespace gpu::reshard {

/// Elements at `from` of one image that go to `to` of another, bytes both; dimensions in any order, a source stride of 0 repeats.
struct Box {
  std::uint64_t from, to;
  std::vector<shard::TileDim> dims;
  shard::DType from_type, to_type;  ///< equal, or two that shard::cast() knows
};

/// n / d for n < 2^31 as a product and a shift.
struct Divisor {
  std::uint32_t multiplier = 0, shift = 0;
  Divisor() = default;
  constexpr explicit Divisor(std::uint32_t d) {
    for (shift = 31; std::uint64_t{1} << (shift - 31) < d;) ++shift;
    multiplier = static_cast<std::uint32_t>(((std::uint64_t{1} << shift) + d - 1) / d);
  }
  constexpr std::uint32_t of(std::uint32_t n) const { return static_cast<std::uint32_t>(std::uint64_t{n} * multiplier >> shift); }
};

/// A box as kernels take it: units (elements, or as many bytes or elements as are moved at once) in loops, the target's fastest last.
struct BoxEntry {
  static constexpr unsigned kDims = 6;
  std::uint64_t from, to;
  std::uint32_t first_block, units;                                  ///< units: in all
  std::array<std::uint32_t, kDims> count, from_stride, to_stride;    ///< strides in bytes
  std::array<Divisor, kDims> by;                                     ///< the counts
  std::uint8_t dims, unit;                                           ///< unit: bytes of a copy, elements of a cast
  shard::DType from_type, to_type;
};

/// Boxes on their way to a device: collected on the host, stored into a table, run from its copy in device memory.
class BoxList {
 public:
  void add(const Box& box);
  void clear();
  bool empty() const { return size() == 0; }
  std::size_t size() const { return runs_.size() + casts_.size() + tiles_.size(); }
  std::size_t table_bytes() const { return size() * sizeof(BoxEntry); }
  void store(std::byte* table) const;
  /// `table`, `from` and `to` in device memory, images aligned to 256 bytes. No two boxes of a list may write the same byte.
  void run(const std::byte* table, const std::byte* from, std::byte* to, StreamView on) const;

  const std::vector<BoxEntry>& runs() const { return runs_; }    ///< by how they are moved; for tests and benchmarks
  const std::vector<BoxEntry>& casts() const { return casts_; }
  const std::vector<BoxEntry>& tiles() const { return tiles_; }

 private:
  void add_copy(const Box& box);
  void add_cast(const Box& box);
  void push(std::vector<BoxEntry>& to, std::uint64_t& blocks, std::uint64_t more, BoxEntry entry);

  std::vector<BoxEntry> runs_, casts_, tiles_;
  std::uint64_t run_blocks_ = 0, cast_blocks_ = 0, tile_blocks_ = 0;
};

}  // namespace gpu::reshard
