// Elements of a logical tensor in row-major order, wherever and however its shards lie.
#pragma once

#include "libshard/source.h"
#include "libshard/state_dict.h"

#include <optional>
#include <span>
#include <vector>

namespace shard {

/// Thread safe with a set of buffers per thread. Keeps references to both arguments of its constructor.
class RangeReader {
 public:
  RangeReader(SummedSource& source, const ShardedTensor& tensor);
  /// Elements [lo, hi) into `into`, in the tensor's own type. Throws BadFormat where a shard is missing.
  void read(Index lo, Index hi, std::span<std::byte> into, Buffers& buffers) const;
  /// Where elements [lo, hi) lie together in this order, if they do.
  struct Run {
    std::uint32_t stream;
    std::uint64_t offset, bytes;
  };
  std::optional<Run> dense(Index lo, Index hi) const;

 private:
  void read_box(const Box& box, std::span<std::byte> into, Buffers& buffers) const;

  SummedSource& source_;
  const ShardedTensor& tensor_;
  std::vector<const Shard*> shards_;
};

}  // namespace shard
