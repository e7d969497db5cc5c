// What one element is as a number, and how far two are apart. Everything is inlined, so that loops over one type know it; kernels of
// devices are made of the same functions.
#pragma once

#include "libshard/float_bits.h"
#include "libshard/numeric.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

namespace shard {

/// The two numbers of a complex one; any other type is its own only part.
SHARD_INLINE DType part_of(DType dtype) { return dtype == DType::C64 ? DType::F32 : dtype == DType::C128 ? DType::F64 : dtype; }

SHARD_INLINE double number(const std::byte* at, DType dtype) {
  const auto wide = [](std::uint32_t bits) { return static_cast<double>(std::bit_cast<float>(bits)); };
  switch (dtype) {
    case DType::F64:
    case DType::C128:
      return load<double>(at);
    case DType::F32:
    case DType::C64:
      return load<float>(at);
    case DType::F16:
      return wide(widen<kF16>(load<std::uint16_t>(at)));
    case DType::BF16:
      return wide(widen<kBF16>(load<std::uint16_t>(at)));
    case DType::F8E4M3:
      return wide(widen<kE4M3>(load<std::uint8_t>(at)));
    case DType::F8E5M2:
      return wide(widen<kE5M2>(load<std::uint8_t>(at)));
    case DType::I64:
      return static_cast<double>(load<std::int64_t>(at));
    case DType::I32:
      return load<std::int32_t>(at);
    case DType::I16:
      return load<std::int16_t>(at);
    case DType::I8:
      return load<std::int8_t>(at);
    case DType::U64:
      return static_cast<double>(load<std::uint64_t>(at));
    case DType::U32:
      return load<std::uint32_t>(at);
    case DType::U16:
      return load<std::uint16_t>(at);
    default:
      return load<std::uint8_t>(at);
  }
}

template <typename Int>
SHARD_INLINE std::uint64_t steps_between(Int a, Int b) {
  return a > b ? static_cast<std::uint64_t>(a) - static_cast<std::uint64_t>(b)
               : static_cast<std::uint64_t>(b) - static_cast<std::uint64_t>(a);
}

template <typename Int>
SHARD_INLINE std::uint64_t integer_steps(const std::byte* a, const std::byte* b) {
  return steps_between(load<Int>(a), load<Int>(b));
}

/// Signed bits in the order of the numbers, so that neighbours differ by one and +0 and -0 coincide.
template <typename Int>
SHARD_INLINE std::uint64_t float_steps(const std::byte* a, const std::byte* b) {
  const auto ordered = [](std::int64_t bits) {
    return bits < 0 ? std::numeric_limits<Int>::min() - bits : bits;
  };
  return steps_between(ordered(load<Int>(a)), ordered(load<Int>(b)));
}

SHARD_INLINE std::uint64_t steps(const std::byte* a, const std::byte* b, DType dtype) {
  const auto x = number(a, dtype), y = number(b, dtype);
  if (x != x || y != y) return std::numeric_limits<std::uint64_t>::max();
  switch (dtype) {
    case DType::F64:
      return float_steps<std::int64_t>(a, b);
    case DType::F32:
      return float_steps<std::int32_t>(a, b);
    case DType::F16:
    case DType::BF16:
      return float_steps<std::int16_t>(a, b);
    case DType::F8E4M3:
    case DType::F8E5M2:
      return float_steps<std::int8_t>(a, b);
    case DType::I64:
      return integer_steps<std::int64_t>(a, b);
    case DType::I32:
      return integer_steps<std::int32_t>(a, b);
    case DType::I16:
      return integer_steps<std::int16_t>(a, b);
    case DType::I8:
      return integer_steps<std::int8_t>(a, b);
    case DType::U64:
      return integer_steps<std::uint64_t>(a, b);
    case DType::U32:
      return integer_steps<std::uint32_t>(a, b);
    case DType::U16:
      return integer_steps<std::uint16_t>(a, b);
    default:
      return integer_steps<std::uint8_t>(a, b);
  }
}

SHARD_INLINE bool is_integer64(DType dtype) { return dtype == DType::I64 || dtype == DType::U64; }

/// Of two parts whose bits differ.
SHARD_INLINE void add_difference(const std::byte* a, const std::byte* b, DType dtype, Difference& out) {
  const auto apart = steps(a, b, dtype);
  out.max_ulp = std::max(out.max_ulp, apart);
  const auto u = number(a, dtype), v = number(b, dtype);
  const auto far = is_integer64(dtype) ? static_cast<double>(apart) : std::abs(u - v);  // finer than f64
  if (std::isnan(far)) {
    if (std::isnan(u) != std::isnan(v)) out.max_abs = out.max_rel = std::numeric_limits<double>::infinity();
    return;
  }
  out.max_abs = std::max(out.max_abs, far);
  const auto scale = std::max(std::abs(u), std::abs(v));
  if (std::isinf(scale))
    out.max_rel = scale;  // far / scale would be NaN
  else if (scale > 0)
    out.max_rel = std::max(out.max_rel, far / scale);
}

}  // namespace shard
