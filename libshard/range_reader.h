// Reading a tensor's elements in row-major order, whatever order they lie in and however they are sharded.
#pragma once

#include "libshard/source.h"

#include <span>
#include <vector>

namespace shard {

/// Reads from one tensor through a source. Thread safe; source and tensor must outlive it.
class RangeReader {
 public:
  RangeReader(SummedSource& source, const ShardedTensor& tensor);
  /// Elements [lo, hi) in row-major order; throws BadFormat where not exactly one shard holds each.
  void read(Index lo, Index hi, std::span<std::byte> into, Buffers& buffers) const;

 private:
  void read_box(const Box& box, std::span<std::byte> into, Buffers& buffers) const;

  SummedSource& source_;
  const ShardedTensor& tensor_;
  std::vector<const Shard*> shards_;
};

}  // namespace shard
