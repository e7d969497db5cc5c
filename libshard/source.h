// Reading a checkpoint's streams so that every byte is also summed: what was recorded is compared at the end.
#pragma once

#include "libshard/checkpoint.h"
#include "libshard/execute.h"
#include "libshard/numeric.h"
#include "libshard/sums.h"
#include "libshard/tile.h"

#include <array>
#include <atomic>
#include <span>
#include <string>
#include <vector>

namespace shard {

/// A buffer that grows and is kept; one set per worker.
struct Buffers {
  std::vector<std::byte> a, b, c;
  static std::span<std::byte> need(std::vector<std::byte>& buffer, std::uint64_t size) {
    if (buffer.size() < size) buffer.resize(size);
    return std::span(buffer).first(size);
  }
};

constexpr std::uint64_t kBlock = 256 << 10;  // fits a core's L2 twice: read, sum and use one block while it is warm
constexpr std::uint64_t kUnit = 4 << 20;     // what one worker takes at a time
constexpr std::uint64_t kShortRun = 512;     // shorter pieces are not worth a sum of their own

/// The block size that a budget allows.
std::uint64_t block_size(const Budget& budget);

/// Thread safe. Streams from kMemoryStreams on are a plan's constants.
class SummedSource {
 public:
  /// `counting`: bytes are counted, not moved.
  SummedSource(const Reader& from, const Kernels& kernels, const std::vector<std::vector<std::byte>>* memory = nullptr, bool counting = false);

  /// Declares that a stream is read for that tensor: it will be summed whole by finish().
  void touch(std::uint32_t stream, const std::string& tensor);
  void read(std::uint32_t stream, std::uint64_t offset, std::span<std::byte> into);
  bool summed(std::uint32_t stream) const { return stream < kMemoryStreams && streams_[stream].crc32.has_value(); }
  void add_sum(std::uint32_t stream, std::uint64_t offset, std::span<const std::byte> bytes) {
    add_sum(stream, offset, bytes.size(), kernels_.crc32(bytes));
  }
  /// offset, length, CRC-32 of what is summed so far.
  std::vector<std::array<std::uint64_t, 3>> sums(std::uint32_t stream) const { return sums_[stream].pieces(); }
  void add_sum(std::uint32_t stream, std::uint64_t offset, std::uint64_t length, std::uint32_t crc) {
    sums_[stream].add(offset, length, crc, kernels_.combine);
  }
  /// One end of a tile, packed in the order of `dims`; `base` is its first byte in the stream. `item`: bytes an element.
  std::span<std::byte> gather(std::uint32_t stream, std::uint64_t base, const EndRuns& runs, const std::vector<TileDim>& dims,
                              const std::vector<Index>& extent, Index item, std::vector<std::byte>& raw, std::vector<std::byte>& out);
  /// Sums what no pass summed, then compares every touched stream with what its file recorded.
  /// `tell` hears of what is read for it alone.
  void finish(const Budget& budget, std::vector<Finding>& findings, const Progress& tell = {});

  std::uint64_t bytes_read() const { return read_; }
  const Reader& reader() const { return from_; }
  std::string file_of(std::uint32_t stream) const;

 private:
  const Reader& from_;
  const Kernels& kernels_;
  const std::vector<std::vector<std::byte>>* memory_;
  const std::vector<Stream>& streams_;
  std::vector<StreamSum> sums_;
  std::vector<const std::string*> touched_;
  bool counting_;
  std::atomic<std::uint64_t> read_ = 0;
};

/// Calls visit(offset in the stream, offset packed in memory) for every run of one end of a tile.
template <typename Visit>
void for_each_run(const EndRuns& runs, Visit&& visit) {
  std::vector<Index> at(runs.outer.size(), 0);
  for (;;) {
    std::uint64_t in_stream = 0, in_memory = 0;
    for (std::size_t i = 0; i < at.size(); ++i) {
      in_stream += static_cast<std::uint64_t>(at[i] * runs.outer[i].from);
      in_memory += static_cast<std::uint64_t>(at[i] * runs.outer[i].to);
    }
    visit(in_stream, in_memory);
    auto i = at.size();
    while (i > 0 && ++at[i - 1] == runs.outer[i - 1].count) at[--i] = 0;
    if (i == 0) return;
  }
}

/// Calls visit(extent, byte offset at the source, byte offset at the target) for every tile of turns [begin, end) of
/// the outermost dimension of a copy; `dims` are tile_dims(copy).
template <typename Visit>
void for_each_tile(const Copy& copy, const std::vector<TileDim>& all_dims, std::uint64_t begin, std::uint64_t end, std::uint64_t block, Visit&& visit) {
  auto dims = all_dims;
  const auto from = copy.from + begin * static_cast<std::uint64_t>(dims.front().from);
  const auto to = copy.to + begin * static_cast<std::uint64_t>(dims.front().to);
  dims.front().count = static_cast<Index>(end - begin);
  const auto full = tile_extent(dims, static_cast<Index>(block / std::max(size_of(copy.from_type), size_of(copy.to_type))));
  std::vector<Index> at(dims.size(), 0);
  for (;;) {
    auto extent = full;
    auto from_at = from, to_at = to;
    for (std::size_t d = 0; d < dims.size(); ++d) {
      extent[d] = std::min(full[d], dims[d].count - at[d]);
      from_at += static_cast<std::uint64_t>(at[d] * dims[d].from);
      to_at += static_cast<std::uint64_t>(at[d] * dims[d].to);
    }
    visit(extent, from_at, to_at);
    auto d = dims.size();
    while (d > 0 && (at[d - 1] += full[d - 1]) >= dims[d - 1].count) at[--d] = 0;
    if (d == 0) return;
  }
}

/// Compares the two places of a comparison; `first` counts elements of its box in row-major order.
Difference compare_places(SummedSource& source, const Comparison& comparison, std::uint64_t block, Buffers& buffers);
/// The finding that a difference is, in the words of its tensor.
Finding describe_difference(const SummedSource& source, const std::string& key, const Comparison& comparison, const Difference& difference);

}  // namespace shard
