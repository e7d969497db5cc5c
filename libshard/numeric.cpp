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
    case DType::F64: return none_full_64(at, count, 0x7ff0'0000'0000'0000);
    case DType::F32: return none_full_32(at, count, 0x7f80'0000);
    case DType::F16: return none_full_16(at, count, kF16.infinity());
    case DType::BF16: return none_full_16(at, count, kBF16.infinity());
    case DType::F8E4M3: return none_full_8(at, count, kE4M3.nan());
    case DType::F8E5M2: return none_full_8(at, count, kE5M2.infinity());
    default: return false;
  }
}

/// The two numbers of a complex one; any other type is its own only part.
DType part_of(DType dtype) {
  return dtype == DType::C64 ? DType::F32 : dtype == DType::C128 ? DType::F64 : dtype;
}

float float_of(std::uint32_t bits) { return std::bit_cast<float>(bits); }

std::uint64_t bits_at(const std::byte* at, std::size_t size) {
  switch (size) {
    case 1: return load<std::uint8_t>(at);
    case 2: return load<std::uint16_t>(at);
    case 4: return load<std::uint32_t>(at);
    default: return load<std::uint64_t>(at);
  }
}

/// Bits as integers in the order of the numbers, so that neighbours differ by one; +0 and -0 coincide.
std::int64_t ordered(std::uint64_t bits, std::size_t size, DType dtype) {
  const auto shift = static_cast<int>(64 - 8 * size);
  const auto extended = static_cast<std::int64_t>(bits << shift) >> shift;
  if (!is_floating(dtype)) return extended;
  const auto magnitude = static_cast<std::int64_t>(bits << shift << 1 >> 1 >> shift);
  return extended < 0 ? -magnitude : magnitude;
}

bool is_unsigned(DType dtype) {
  return !is_floating(dtype) && dtype != DType::I64 && dtype != DType::I32 && dtype != DType::I16 && dtype != DType::I8;
}

std::uint64_t apart(std::int64_t a, std::int64_t b) {
  return a > b ? static_cast<std::uint64_t>(a) - static_cast<std::uint64_t>(b)
               : static_cast<std::uint64_t>(b) - static_cast<std::uint64_t>(a);
}

/// Of two parts whose bits differ.
void add_difference(const std::byte* a, const std::byte* b, DType dtype, Difference& out) {
  const auto steps = ulp_distance(a, b, dtype);
  out.max_ulp = std::max(out.max_ulp, steps);
  const auto u = value_at(a, dtype), v = value_at(b, dtype);
  const auto far = is_floating(dtype) ? std::abs(u - v) : static_cast<double>(steps);  // i64 is finer than f64
  if (std::isnan(far)) {
    if (std::isnan(u) != std::isnan(v)) out.max_abs = out.max_rel = std::numeric_limits<double>::infinity();
    return;
  }
  out.max_abs = std::max(out.max_abs, far);
  const auto scale = std::max(std::abs(u), std::abs(v));
  if (std::isinf(scale)) out.max_rel = scale;  // far / scale would be NaN
  else if (scale > 0) out.max_rel = std::max(out.max_rel, far / scale);
}

}  // namespace

double value_at(const std::byte* at, DType dtype) {
  switch (dtype) {
    case DType::F64: return load<double>(at);
    case DType::F32: return load<float>(at);
    case DType::F16: return float_of(widen<kF16>(load<std::uint16_t>(at)));
    case DType::BF16: return float_of(widen<kBF16>(load<std::uint16_t>(at)));
    case DType::F8E4M3: return float_of(widen<kE4M3>(load<std::uint8_t>(at)));
    case DType::F8E5M2: return float_of(widen<kE5M2>(load<std::uint8_t>(at)));
    case DType::I64: return static_cast<double>(load<std::int64_t>(at));
    case DType::I32: return load<std::int32_t>(at);
    case DType::I16: return load<std::int16_t>(at);
    case DType::I8: return load<std::int8_t>(at);
    case DType::U64: return static_cast<double>(load<std::uint64_t>(at));
    case DType::U32: return load<std::uint32_t>(at);
    case DType::U16: return load<std::uint16_t>(at);
    case DType::C64: return load<float>(at);
    case DType::C128: return load<double>(at);
    default: return load<std::uint8_t>(at);
  }
}

std::uint64_t ulp_distance(const std::byte* a, const std::byte* b, DType dtype) {
  if (is_floating(dtype) && (std::isnan(value_at(a, dtype)) || std::isnan(value_at(b, dtype))))
    return std::numeric_limits<std::uint64_t>::max();
  const auto size = size_of(dtype);
  const auto x = bits_at(a, size), y = bits_at(b, size);
  if (is_unsigned(dtype)) return x > y ? x - y : y - x;
  return apart(ordered(x, size, dtype), ordered(y, size, dtype));
}

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
  const auto part = part_of(dtype);
  const auto size = size_of(dtype), part_size = size_of(part), n = a.size() / size;
  constexpr std::size_t kBlock = 1024;
  for (std::size_t at = 0; at < n; at += kBlock) {
    const auto count = std::min(kBlock, n - at);
    if (std::memcmp(a.data() + at * size, b.data() + at * size, count * size) == 0) continue;
    for (auto i = at; i < at + count; ++i) {
      const auto *x = a.data() + i * size, *y = b.data() + i * size;
      if (std::memcmp(x, y, size) == 0) continue;
      if (out.count++ == 0) out.first = i;
      for (std::size_t at_part = 0; at_part < size; at_part += part_size)
        if (std::memcmp(x + at_part, y + at_part, part_size) != 0)
          add_difference(x + at_part, y + at_part, part, out);
    }
  }
  return out;
}

}  // namespace shard
