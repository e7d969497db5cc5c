// What is not finite and what differs, element by element only in blocks where a fast look finds something.
#include "libshard/numeric.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "libshard/element.h"
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
