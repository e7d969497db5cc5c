// Numbers inside tensors: casts, tests for what is not finite, and how far two tensors are apart.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "libshard/dtype.h"

namespace shard {

/// Whether cast() knows the pair: f64, f32, f16, bf16, f8_e4m3 and f8_e5m2 among each other, and equal types.
bool castable(DType from, DType to);
/// Element by element, rounding to nearest even. f8_e4m3 has no infinity: beyond 464 becomes NaN, so that a
/// loss shows, as in torch before it took to saturating at 448 (2.15 does).
void cast(std::span<const std::byte> from, DType from_type, std::span<std::byte> to, DType to_type);
/// One element as a double; integers and bool as well.
double value_at(const std::byte* element, DType dtype);

/// Steps between neighbouring numbers of the type, 0 from +0 to -0, the largest where one is NaN; of
/// integers, their distance. Not for complex types.
std::uint64_t ulp_distance(const std::byte* a, const std::byte* b, DType dtype);

struct NonFinite {
  std::uint64_t nan = 0, inf = 0, first = 0;  ///< first: element index of the first that is not finite
};
NonFinite count_nonfinite(std::span<const std::byte> bytes, DType dtype);

struct Difference {
  std::uint64_t count = 0, first = 0;  ///< elements whose bytes differ; the index of the first
  double max_abs = 0, max_rel = 0;     ///< infinite where only one is NaN
  std::uint64_t max_ulp = 0;           ///< see ulp_distance()
};
/// Of equally many elements; NaNs of the same bits are equal.
Difference compare(std::span<const std::byte> a, std::span<const std::byte> b, DType dtype);

}  // namespace shard
