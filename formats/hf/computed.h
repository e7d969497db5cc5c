// Weights that are computed when they are read: what dequantising and merging share.
#pragma once

#include "formats/checkpoint.h"

namespace formats::hf {

/// Where a stored tensor's bytes begin. The pool owns what is computed from it, so it is there as long as that is.
struct StoredBytes {
  const FilePool* pool = nullptr;
  std::uint32_t file = 0;
  std::uint64_t begin = 0;
  void read(std::uint64_t offset, std::span<std::byte> into) const;
};

/// The bytes of a tensor that lies in one piece, row by row. Throws BadFormat where it does not.
StoredBytes bytes_of(const Checkpoint& checkpoint, const shard::ShardedTensor& tensor);

/// Elements that are computed as floats and rounded once. A range is worked off in blocks, whatever its length.
class ComputedElements : public ComputedBytes {
 public:
  ComputedElements(shard::DType dtype, std::uint64_t count) : dtype_(dtype), count_(count) {}
  void read(std::uint64_t offset, std::span<std::byte> into) const final;
  std::uint64_t bytes() const { return count_ * size_of(dtype_); }

 protected:
  /// Elements [first, first + out.size()) in row-major order.
  virtual void compute(std::uint64_t first, std::span<float> out) const = 0;

 private:
  shard::DType dtype_;
  std::uint64_t count_;
};

/// Makes `tensor` lie in a stream of its own that is computed. `stride` counts elements.
void place(const Checkpoint& checkpoint, shard::ShardedStateDict& dict, shard::ShardedTensor tensor, std::shared_ptr<const ComputedElements> bytes,
           std::string file, shard::Shape stride);

}  // namespace formats::hf
