// Bit patterns of the floating types. Fast paths only where whole blocks are fine; the rest is plain.
#include "libshard/numeric.h"

#include "libshard/error.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__)
#define SHARD_CLONES __attribute__((target_clones("arch=skylake-avx512", "avx2", "default")))
#else
#define SHARD_CLONES
#endif

namespace shard {
namespace {

/// Exponent and mantissa widths; the sign is one bit.
struct Form {
  int exponent, mantissa;
};
Form form(DType dtype) {
  switch (dtype) {
    case DType::F64: return {11, 52};
    case DType::F32: return {8, 23};
    case DType::F16: return {5, 10};
    case DType::BF16: return {8, 7};
    case DType::F8E4M3: return {4, 3};
    case DType::F8E5M2: return {5, 2};
    default: return {0, 0};
  }
}

template <typename T>
T load(const std::byte* at) {
  T out;
  std::memcpy(&out, at, sizeof out);
  return out;
}

std::uint64_t bits_at(const std::byte* at, std::size_t size) {
  switch (size) {
    case 1: return load<std::uint8_t>(at);
    case 2: return load<std::uint16_t>(at);
    case 4: return load<std::uint32_t>(at);
    default: return load<std::uint64_t>(at);
  }
}

/// Bits of a small float as a float; exact, since float holds every value of every smaller type.
float widen(std::uint32_t bits, Form f, bool no_infinity) {
  const auto sign = bits >> (f.exponent + f.mantissa) & 1;
  const auto exponent = static_cast<int>(bits >> f.mantissa & ((1u << f.exponent) - 1));
  const auto mantissa = bits & ((1u << f.mantissa) - 1);
  const auto all = (1 << f.exponent) - 1, bias = (1 << (f.exponent - 1)) - 1;
  float out;
  if (exponent == all && no_infinity && mantissa == (1u << f.mantissa) - 1) out = std::numeric_limits<float>::quiet_NaN();
  else if (exponent == all && !no_infinity)
    out = std::bit_cast<float>(0x7f800000u | mantissa << (23 - f.mantissa));
  else if (exponent == 0) out = std::ldexp(static_cast<float>(mantissa), 1 - bias - f.mantissa);
  else out = std::ldexp(static_cast<float>(mantissa + (1u << f.mantissa)), exponent - bias - f.mantissa);
  return sign ? -out : out;
}

/// A float rounded to a small type, to nearest even.
std::uint32_t narrow(float value, Form f, bool no_infinity) {
  const auto raw = std::bit_cast<std::uint32_t>(value);
  const auto sign = (raw >> 31) << (f.exponent + f.mantissa);
  const auto magnitude = raw & 0x7fffffffu;
  const auto all = (1u << f.exponent) - 1;
  const auto nan = no_infinity ? (all << f.mantissa | ((1u << f.mantissa) - 1)) : (all << f.mantissa | 1u << (f.mantissa - 1));
  if (magnitude > 0x7f800000u) return sign | nan;
  const auto bias = (1 << (f.exponent - 1)) - 1;
  const int exponent = static_cast<int>(magnitude >> 23) - 127;
  const int drop = 23 - f.mantissa + std::max(0, 1 - bias - exponent);  // a subnormal loses more bits
  std::uint32_t out;
  if (drop > 25) {
    out = 0;
  } else {
    const std::uint64_t mantissa = (magnitude & 0x7fffffu) | (exponent > -127 ? 0x800000u : 0u);
    const std::uint64_t half = std::uint64_t{1} << (drop - 1), rest = mantissa & ((half << 1) - 1);
    std::uint64_t kept = mantissa >> drop;
    if (rest > half || (rest == half && (kept & 1))) ++kept;
    if (exponent < 1 - bias) out = static_cast<std::uint32_t>(kept);  // may carry into the smallest normal
    else out = static_cast<std::uint32_t>(kept + (static_cast<std::uint64_t>(exponent + bias - 1) << f.mantissa));
  }
  const auto overflow = no_infinity ? nan : all << f.mantissa;
  if (magnitude == 0x7f800000u || out >= overflow) out = overflow;
  return sign | out;
}

SHARD_CLONES void bf16_to_f32(const std::uint16_t* from, std::uint32_t* to, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) to[i] = static_cast<std::uint32_t>(from[i]) << 16;
}

SHARD_CLONES void f32_to_bf16(const std::uint32_t* from, std::uint16_t* to, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) {
    const auto bits = from[i];
    const auto rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
    to[i] = static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16 | 0x40u) : rounded);
  }
}

float as_float(const std::byte* at, DType dtype) {
  switch (dtype) {
    case DType::F64: return static_cast<float>(load<double>(at));
    case DType::F32: return load<float>(at);
    default: return widen(static_cast<std::uint32_t>(bits_at(at, size_of(dtype))), form(dtype), dtype == DType::F8E4M3);
  }
}

/// A double as a float that rounds to the same small number: ties broken by what the float would lose.
float round_to_odd(double value) {
  auto out = static_cast<float>(value);
  if (std::isfinite(out) && static_cast<double>(out) != value && !(std::bit_cast<std::uint32_t>(out) & 1)) {
    const auto toward = std::abs(static_cast<double>(out)) > std::abs(value) ? 0.0f : std::copysign(std::numeric_limits<float>::infinity(), out);
    out = std::nextafter(out, toward);
  }
  return out;
}

SHARD_CLONES bool all_finite_16(const std::uint16_t* at, std::size_t n, std::uint16_t mask) {
  std::uint16_t bad = 0;
  for (std::size_t i = 0; i < n; ++i) bad |= static_cast<std::uint16_t>((at[i] & mask) == mask ? 1 : 0);
  return bad == 0;
}
SHARD_CLONES bool all_finite_32(const std::uint32_t* at, std::size_t n) {
  std::uint32_t bad = 0;
  for (std::size_t i = 0; i < n; ++i) bad |= (at[i] & 0x7f800000u) == 0x7f800000u ? 1u : 0u;
  return bad == 0;
}

bool block_finite(const std::byte* at, std::size_t n, DType dtype) {
  const auto aligned = [&](std::size_t to) { return reinterpret_cast<std::uintptr_t>(at) % to == 0; };
  if (dtype == DType::BF16 && aligned(2)) return all_finite_16(reinterpret_cast<const std::uint16_t*>(at), n, 0x7f80);
  if (dtype == DType::F16 && aligned(2)) return all_finite_16(reinterpret_cast<const std::uint16_t*>(at), n, 0x7c00);
  if (dtype == DType::F32 && aligned(4)) return all_finite_32(reinterpret_cast<const std::uint32_t*>(at), n);
  return false;
}

/// Bits as integers whose order is that of the numbers, so that neighbours differ by one; +0 and -0 coincide.
std::int64_t ordered(std::uint64_t bits, int width) {
  const auto sign = bits >> (width - 1) & 1;
  const auto magnitude = static_cast<std::int64_t>(bits & ((std::uint64_t{1} << (width - 1)) - 1));
  return sign ? -magnitude : magnitude;
}

std::uint64_t steps_apart(const std::byte* a, const std::byte* b, DType dtype) {
  const auto size = size_of(dtype);
  if (size > 8) return 1;
  if (is_floating(dtype)) {
    const double x = value_at(a, dtype), y = value_at(b, dtype);
    if (std::isnan(x) || std::isnan(y)) return std::numeric_limits<std::uint64_t>::max();
    const auto width = static_cast<int>(size * 8);
    const auto i = ordered(bits_at(a, size), width), j = ordered(bits_at(b, size), width);
    return i > j ? static_cast<std::uint64_t>(i) - static_cast<std::uint64_t>(j) : static_cast<std::uint64_t>(j) - static_cast<std::uint64_t>(i);
  }
  const auto i = bits_at(a, size), j = bits_at(b, size);
  return i > j ? i - j : j - i;
}

}  // namespace

bool castable(DType from, DType to) { return from == to || (form(from).exponent && form(to).exponent); }

void cast(std::span<const std::byte> from, DType from_type, std::span<std::byte> to, DType to_type) {
  const auto from_size = size_of(from_type), to_size = size_of(to_type), n = from.size() / from_size;
  require(castable(from_type, to_type), Code::Mismatch, [&] { return fmt::format("cannot cast {} to {}", name(from_type), name(to_type)); });
  if (from_type == to_type) {
    std::memcpy(to.data(), from.data(), from.size());
  } else if (from_type == DType::BF16 && to_type == DType::F32) {
    bf16_to_f32(reinterpret_cast<const std::uint16_t*>(from.data()), reinterpret_cast<std::uint32_t*>(to.data()), n);
  } else if (from_type == DType::F32 && to_type == DType::BF16) {
    f32_to_bf16(reinterpret_cast<const std::uint32_t*>(from.data()), reinterpret_cast<std::uint16_t*>(to.data()), n);
  } else {
    for (std::size_t i = 0; i < n; ++i) {
      const auto* in = from.data() + i * from_size;
      auto* out = to.data() + i * to_size;
      if (to_type == DType::F64) {
        const double value = from_type == DType::F32 ? load<float>(in) : as_float(in, from_type);
        std::memcpy(out, &value, sizeof value);
      } else if (to_type == DType::F32) {
        const float value = as_float(in, from_type);
        std::memcpy(out, &value, sizeof value);
      } else {
        const float value = from_type == DType::F64 ? round_to_odd(load<double>(in)) : as_float(in, from_type);
        const auto bits = narrow(value, form(to_type), to_type == DType::F8E4M3);
        std::memcpy(out, &bits, to_size);  // little-endian: the low bytes come first
      }
    }
  }
}

double value_at(const std::byte* at, DType dtype) {
  switch (dtype) {
    case DType::F64: return load<double>(at);
    case DType::I64: return static_cast<double>(load<std::int64_t>(at));
    case DType::I32: return load<std::int32_t>(at);
    case DType::I16: return load<std::int16_t>(at);
    case DType::I8: return load<std::int8_t>(at);
    case DType::U64: return static_cast<double>(load<std::uint64_t>(at));
    case DType::U32: return load<std::uint32_t>(at);
    case DType::U16: return load<std::uint16_t>(at);
    case DType::C64: return load<float>(at);
    case DType::C128: return load<double>(at);
    default: return is_floating(dtype) ? as_float(at, dtype) : load<std::uint8_t>(at);
  }
}

NonFinite count_nonfinite(std::span<const std::byte> bytes, DType dtype) {
  NonFinite out;
  if (!is_floating(dtype) && dtype != DType::C64 && dtype != DType::C128) return out;
  const auto part = dtype == DType::C64 ? DType::F32 : dtype == DType::C128 ? DType::F64 : dtype;
  const auto per_element = size_of(dtype) / size_of(part), size = size_of(part), n = bytes.size() / size;
  constexpr std::size_t kBlock = 4096;
  for (std::size_t at = 0; at < n; at += kBlock) {
    const auto count = std::min(kBlock, n - at);
    if (block_finite(bytes.data() + at * size, count, part)) continue;
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
  Difference out;
  const auto size = size_of(dtype), n = a.size() / size;
  constexpr std::size_t kBlock = 1024;
  for (std::size_t at = 0; at < n; at += kBlock) {
    const auto count = std::min(kBlock, n - at);
    if (std::memcmp(a.data() + at * size, b.data() + at * size, count * size) == 0) continue;
    for (auto i = at; i < at + count; ++i) {
      const auto *x = a.data() + i * size, *y = b.data() + i * size;
      if (std::memcmp(x, y, size) == 0) continue;
      if (out.count++ == 0) out.first = i;
      out.max_ulp = std::max(out.max_ulp, steps_apart(x, y, dtype));
      const auto u = value_at(x, dtype), v = value_at(y, dtype), apart = std::abs(u - v);
      if (std::isnan(apart)) {
        if (std::isnan(u) != std::isnan(v)) out.max_abs = out.max_rel = std::numeric_limits<double>::infinity();
        continue;
      }
      out.max_abs = std::max(out.max_abs, apart);
      const auto scale = std::max(std::abs(u), std::abs(v));
      if (scale > 0) out.max_rel = std::max(out.max_rel, apart / scale);
    }
  }
  return out;
}

}  // namespace shard
