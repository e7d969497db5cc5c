// The two ends of a conversion: something that reads streams and something that writes them.
#pragma once

#include "libshard/state_dict.h"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>

namespace shard {

/// A stream that is a plain byte range of an open local file says so, so that the kernel can move long runs.
struct FileRange {
  int descriptor;
  std::uint64_t offset;
  std::shared_ptr<const void> owner;  ///< keeps the descriptor open
};

/// A stored matrix of e4m3 numbers, row by row, with one factor for each block of rows and columns, whose product a stream reads as.
struct ScaledMatrix {
  virtual ~ScaledMatrix() = default;
  Index rows = 0, columns = 0, block_rows = 0, block_columns = 0;
  /// From number `first` on. Thread safe.
  virtual void numbers(std::uint64_t first, std::span<std::byte> into) const = 0;
  /// [⌈rows/block_rows⌉, ⌈columns/block_columns⌉].
  virtual std::vector<float> scales() const = 0;
};

struct Reader {
  virtual ~Reader() = default;
  virtual const ShardedStateDict& describe() const = 0;
  /// Fills `into` from `offset` of a stream; thread safe.
  virtual void read(std::uint32_t stream, std::uint64_t offset, std::span<std::byte> into) const = 0;
  virtual std::optional<FileRange> file_range(std::uint32_t stream) const = 0;
  /// What the stream is computed from; null where that is something else.
  virtual const ScaledMatrix* scaled_matrix(std::uint32_t) const { return nullptr; }
};

/// Without commit() nothing is left behind.
struct Writer {
  virtual ~Writer() = default;
  virtual const ShardedStateDict& describe() const = 0;
  /// Thread safe for disjoint ranges. Bytes never written read as zeros.
  virtual void write(std::uint32_t stream, std::uint64_t offset, std::span<const std::byte> from) = 0;
  /// Reads back what was written.
  virtual void read(std::uint32_t stream, std::uint64_t offset, std::span<std::byte> into) const = 0;
  virtual std::optional<FileRange> file_range(std::uint32_t stream) = 0;
  /// Publishes; `crc32` has a sum for every stream that asks for one (`Stream::summed`).
  virtual void commit(std::span<const std::optional<std::uint32_t>> crc32, bool sync) = 0;
};

}  // namespace shard
