// What is not finite and what differs, element by element only in blocks where a fast look finds something.
#include "libshard/numeric.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "libshard/error.h"
#include "libshard/float_bits.h"

namespace shard {
namespace {

template <typename T>
SHARD_INLINE bool none_full(const std::byte* at, std::size_t count, T mask) {
  T full = 0;
  for (std::size_t i = 0; i < count; ++i)
    full |= static_cast<T>((load<T>(at + sizeof(T) * i) & mask) == mask ? ~T{0} : T{0});
  return full == 0;
}
SHARD_CLONES bool none_full_8(const std::byte* at, std::size_t count, std::uint8_t mask) {
  return none_full<std::uint8_t>(at, count, mask);
}
SHARD_CLONES bool none_full_16(const std::byte* at, std::size_t count, std::uint16_t mask) {
  return none_full<std::uint16_t>(at, count, mask);
}
SHARD_CLONES bool none_full_32(const std::byte* at, std::size_t count, std::uint32_t mask) {
  return none_full<std::uint32_t>(at, count, mask);
}
SHARD_CLONES bool none_full_64(const std::byte* at, std::size_t count, std::uint64_t mask) {
  return none_full<std::uint64_t>(at, count, mask);
}

/// No exponent of the block is that of infinity and NaN.
bool all_finite(const std::byte* at, std::size_t count, DType dtype) {
  switch (dtype) {
    case DType::F64:
      return none_full_64(at, count, 0x7ff0'0000'0000'0000);
    case DType::F32:
      return none_full_32(at, count, 0x7f80'0000);
    case DType::F16:
      return none_full_16(at, count, kF16.infinity());
    case DType::BF16:
      return none_full_16(at, count, kBF16.infinity());
    case DType::F8E4M3:
      return none_full_8(at, count, kE4M3.nan());
    case DType::F8E5M2:
      return none_full_8(at, count, kE5M2.infinity());
    default:
      return false;
  }
}

/// The two numbers of a complex one; any other type is its own only part.
DType part_of(DType dtype) {
  return dtype == DType::C64 ? DType::F32 : dtype == DType::C128 ? DType::F64 : dtype;
}

// From here on everything is inlined, so that loops over one type know it.

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

constexpr bool is_integer64(DType dtype) { return dtype == DType::I64 || dtype == DType::U64; }

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

/// Two runs of elements, which start as element `first`.
struct Pair {
  const std::byte *a, *b;
  std::size_t count;
  std::uint64_t first;
};

/// Elements of `parts` parts of `size` bytes each.
SHARD_INLINE void compare_as(const Pair& pair, DType part, std::size_t size, std::size_t parts,
                             Difference& out) {
  for (std::size_t i = 0; i < pair.count; ++i) {
    const auto *x = pair.a + i * size * parts, *y = pair.b + i * size * parts;
    if (std::memcmp(x, y, size * parts) == 0) continue;
    if (out.count++ == 0) out.first = pair.first + i;
    for (std::size_t at = 0; at < size * parts; at += size)
      if (std::memcmp(x + at, y + at, size) != 0) add_difference(x + at, y + at, part, out);
  }
}

void compare_block(const Pair& pair, DType dtype, Difference& out) {
  switch (dtype) {
    case DType::F64:
      return compare_as(pair, DType::F64, 8, 1, out);
    case DType::F32:
      return compare_as(pair, DType::F32, 4, 1, out);
    case DType::F16:
      return compare_as(pair, DType::F16, 2, 1, out);
    case DType::BF16:
      return compare_as(pair, DType::BF16, 2, 1, out);
    case DType::F8E4M3:
      return compare_as(pair, DType::F8E4M3, 1, 1, out);
    case DType::F8E5M2:
      return compare_as(pair, DType::F8E5M2, 1, 1, out);
    default: {
      const auto part = part_of(dtype);
      return compare_as(pair, part, size_of(part), size_of(dtype) / size_of(part), out);
    }
  }
}

}  // namespace

double value_at(const std::byte* at, DType dtype) { return number(at, dtype); }

std::uint64_t ulp_distance(const std::byte* a, const std::byte* b, DType dtype) { return steps(a, b, dtype); }

NonFinite count_nonfinite(std::span<const std::byte> bytes, DType dtype) {
  NonFinite out;
  const auto part = part_of(dtype);
  if (!is_floating(part)) return out;
  const auto size = size_of(part), per_element = size_of(dtype) / size, n = bytes.size() / size;
  constexpr std::size_t kBlock = 4096;
  for (std::size_t at = 0; at < n; at += kBlock) {
    const auto count = std::min(kBlock, n - at);
    if (all_finite(bytes.data() + at * size, count, part)) continue;
    for (auto i = at; i < at + count; ++i) {
      const auto value = value_at(bytes.data() + i * size, part);
      if (std::isfinite(value)) continue;
      if (out.nan + out.inf == 0) out.first = i / per_element;
      ++(std::isnan(value) ? out.nan : out.inf);
    }
  }
  return out;
}

Difference compare(std::span<const std::byte> a, std::span<const std::byte> b, DType dtype) {
  require(a.size() == b.size(), Code::Mismatch,
          [&] { return fmt::format("{} and {} bytes; should be as many", a.size(), b.size()); });
  Difference out;
  const auto size = size_of(dtype), n = a.size() / size;
  constexpr std::size_t kBlock = 1024;
  for (std::size_t at = 0; at < n; at += kBlock) {
    const auto count = std::min(kBlock, n - at);
    if (std::memcmp(a.data() + at * size, b.data() + at * size, count * size) == 0) continue;
    compare_block({a.data() + at * size, b.data() + at * size, count, at}, dtype, out);
  }
  return out;
}

}  // namespace shard
