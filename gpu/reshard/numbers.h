// What is not finite and what differs, in device memory: the counts of libshard/numeric.h.
#pragma once

#include "gpu/runtime.h"
#include "libshard/numeric.h"

namespace gpu::reshard {

/// A run of elements, aligned to 16 bytes, counted into one of the results.
struct ScanPiece {
  std::uint64_t at;         ///< bytes from the base
  std::uint64_t first;      ///< number of the first element
  std::uint32_t bytes;      ///< at most kScanPiece
  std::uint32_t result;
  shard::DType dtype;
};
constexpr std::uint32_t kScanPiece = 64 << 10;  ///< what one block looks at

/// As kernels gather them; zeros to begin with.
struct ScanCounts {
  unsigned long long nan, inf, before;  ///< before: ~first, 0 where there is none
  shard::NonFinite found() const { return {nan, inf, before ? ~before : 0}; }
};
struct CompareCounts {
  unsigned long long count, before, max_ulp, max_abs, max_rel;  ///< the last two as bits of doubles
  shard::Difference found() const;
};

/// results[piece.result] over floating and complex pieces; all in device memory.
void count_nonfinite(const ScanPiece* pieces, std::uint32_t count, const std::byte* base, ScanCounts* results, StreamView on);
/// The same piece of `a` and of `b`.
void compare(const ScanPiece* pieces, std::uint32_t count, const std::byte* a, const std::byte* b, CompareCounts* results, StreamView on);

}  // namespace gpu::reshard
