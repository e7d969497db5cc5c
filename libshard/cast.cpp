// Elements of one floating type as another: one loop per narrow type, joined through f32. Refuses what is no
// floating number.
#include <algorithm>
#include <array>

#include "libshard/error.h"
#include "libshard/float_bits.h"
#include "libshard/numeric.h"

namespace shard {
namespace {

using Bytes = const std::byte* __restrict;
using Into = std::byte* __restrict;
using Loop = void (*)(Bytes from, Into to, std::size_t count);

template <typename T, Form form>
SHARD_INLINE void widen_all(Bytes from, Into to, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) store(to + 4 * i, widen<form>(load<T>(from + sizeof(T) * i)));
}
template <typename T, Form form>
SHARD_INLINE void narrow_all(Bytes from, Into to, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i)
    store(to + sizeof(T) * i, static_cast<T>(narrow<form>(load<std::uint32_t>(from + 4 * i))));
}

using u8 = std::uint8_t;
using u16 = std::uint16_t;
SHARD_CLONES void f16_to_f32(Bytes from, Into to, std::size_t n) { widen_all<u16, kF16>(from, to, n); }
SHARD_CLONES void bf16_to_f32(Bytes from, Into to, std::size_t n) { widen_all<u16, kBF16>(from, to, n); }
SHARD_CLONES void e4m3_to_f32(Bytes from, Into to, std::size_t n) { widen_all<u8, kE4M3>(from, to, n); }
SHARD_CLONES void e5m2_to_f32(Bytes from, Into to, std::size_t n) { widen_all<u8, kE5M2>(from, to, n); }
SHARD_CLONES void f32_to_f16(Bytes from, Into to, std::size_t n) { narrow_all<u16, kF16>(from, to, n); }
SHARD_CLONES void f32_to_bf16(Bytes from, Into to, std::size_t n) { narrow_all<u16, kBF16>(from, to, n); }
SHARD_CLONES void f32_to_e4m3(Bytes from, Into to, std::size_t n) { narrow_all<u8, kE4M3>(from, to, n); }
SHARD_CLONES void f32_to_e5m2(Bytes from, Into to, std::size_t n) { narrow_all<u8, kE5M2>(from, to, n); }
SHARD_CLONES void f32_to_f64(Bytes from, Into to, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) store(to + 8 * i, static_cast<double>(load<float>(from + 4 * i)));
}
SHARD_CLONES void f64_to_f32(Bytes from, Into to, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) store(to + 4 * i, static_cast<float>(load<double>(from + 8 * i)));
}
SHARD_CLONES void f64_to_odd(Bytes from, Into to, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) store(to + 4 * i, to_odd_float(load<double>(from + 8 * i)));
}
void copy_f32(Bytes from, Into to, std::size_t n) { std::memcpy(to, from, 4 * n); }

struct Loops {
  DType dtype;
  Loop to_f32, from_f32;
};
constexpr std::array kLoops{
    Loops{DType::F64, f64_to_f32, f32_to_f64},      Loops{DType::F32, copy_f32, copy_f32},
    Loops{DType::F16, f16_to_f32, f32_to_f16},      Loops{DType::BF16, bf16_to_f32, f32_to_bf16},
    Loops{DType::F8E4M3, e4m3_to_f32, f32_to_e4m3}, Loops{DType::F8E5M2, e5m2_to_f32, f32_to_e5m2},
};

const Loops* loops(DType dtype) {
  const auto found =
      std::find_if(kLoops.begin(), kLoops.end(), [&](const Loops& one) { return one.dtype == dtype; });
  return found == kLoops.end() ? nullptr : &*found;
}

}  // namespace

bool castable(DType from, DType to) { return from == to || (loops(from) && loops(to)); }

void cast(std::span<const std::byte> from, DType from_type, std::span<std::byte> to, DType to_type) {
  require(castable(from_type, to_type), Code::Mismatch,
          [&] { return fmt::format("cannot cast {} to {}", name(from_type), name(to_type)); });
  const auto from_size = size_of(from_type), to_size = size_of(to_type), n = from.size() / from_size;
  require(to.size() / to_size >= n, Code::Mismatch, [&] {
    return fmt::format("{} elements of {} do not fit {} bytes of {}", n, name(from_type), to.size(),
                       name(to_type));
  });
  if (n == 0) return;
  if (from_type == to_type) return static_cast<void>(std::memcpy(to.data(), from.data(), n * from_size));
  const auto widen = from_type == DType::F64 && to_type != DType::F32 ? f64_to_odd : loops(from_type)->to_f32;
  const auto narrow = loops(to_type)->from_f32;
  if (to_type == DType::F32) return widen(from.data(), to.data(), n);
  if (from_type == DType::F32) return narrow(from.data(), to.data(), n);
  constexpr std::size_t kBlock = 2048;  // stays in the nearest cache
  alignas(64) std::array<std::byte, 4 * kBlock> floats;
  for (std::size_t at = 0; at < n; at += kBlock) {
    const auto count = std::min(kBlock, n - at);
    widen(from.data() + at * from_size, floats.data(), count);
    narrow(floats.data(), to.data() + at * to_size, count);
  }
}

}  // namespace shard
