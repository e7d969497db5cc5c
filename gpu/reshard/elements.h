// Casts of single elements in kernels: the functions of libshard/cast.cpp, and what the host's processor does with NaN spelled out,
// since devices have a NaN of their own.
#pragma once

#include "gpu/kernel.h"
#include "libshard/dtype.h"
#include "libshard/float_bits.h"

// Arrays live in registers only where every index is a constant.
#ifdef __CUDACC__
#define GPU_UNROLL _Pragma("unroll")
#else
#define GPU_UNROLL
#endif

namespace gpu::reshard {

/// Memory operations that are one instruction where the address allows.
struct alignas(16) Wide {
  std::uint32_t word[4];
};
template <typename T>
GPU_CODE T load_as(const std::byte* from) {
  return *reinterpret_cast<const T*>(from);
}
template <typename T>
GPU_CODE void store_as(std::byte* to, T value) {
  *reinterpret_cast<T*>(to) = value;
}

/// f64 to f32: NaN keeps its sign and the first bits of its payload, and is quiet. `odd`: to odd, for a second rounding to follow.
GPU_CODE std::uint32_t float_of_double(std::uint64_t bits, bool odd) {
  const auto value = std::bit_cast<double>(bits);
  if (value != value) return static_cast<std::uint32_t>(bits >> 63 << 31) | 0x7fc00000u | (static_cast<std::uint32_t>(bits >> 29) & 0x3fffffu);
  return odd ? shard::to_odd_float(value) : std::bit_cast<std::uint32_t>(static_cast<float>(value));
}
GPU_CODE std::uint64_t double_of_float(std::uint32_t bits) {
  const auto value = std::bit_cast<float>(bits);
  if (value != value) return std::uint64_t{bits >> 31} << 63 | 0x7ff8000000000000u | std::uint64_t{bits & 0x7fffffu} << 29;
  return std::bit_cast<std::uint64_t>(static_cast<double>(value));
}

/// N elements' bits as those of floats, and back. `odd`: what follows is narrower than f32.
template <unsigned N>
GPU_CODE void to_floats(const std::uint64_t (&in)[N], shard::DType type, bool odd, std::uint32_t (&out)[N]) {
  const auto each = [&](auto&& one) {
    GPU_UNROLL
    for (unsigned i = 0; i < N; ++i) out[i] = one(in[i]);
  };
  switch (type) {
    case shard::DType::F64: return each([&](std::uint64_t bits) { return float_of_double(bits, odd); });
    case shard::DType::F16: return each([](std::uint64_t bits) { return shard::widen<shard::kF16>(static_cast<std::uint32_t>(bits)); });
    case shard::DType::BF16: return each([](std::uint64_t bits) { return shard::widen<shard::kBF16>(static_cast<std::uint32_t>(bits)); });
    case shard::DType::F8E4M3: return each([](std::uint64_t bits) { return shard::widen<shard::kE4M3>(static_cast<std::uint32_t>(bits)); });
    case shard::DType::F8E5M2: return each([](std::uint64_t bits) { return shard::widen<shard::kE5M2>(static_cast<std::uint32_t>(bits)); });
    default: return each([](std::uint64_t bits) { return static_cast<std::uint32_t>(bits); });
  }
}
template <unsigned N>
GPU_CODE void from_floats(const std::uint32_t (&in)[N], shard::DType type, std::uint64_t (&out)[N]) {
  const auto each = [&](auto&& one) {
    GPU_UNROLL
    for (unsigned i = 0; i < N; ++i) out[i] = one(in[i]);
  };
  switch (type) {
    case shard::DType::F64: return each([](std::uint32_t bits) { return double_of_float(bits); });
    case shard::DType::F16: return each([](std::uint32_t bits) { return shard::narrow<shard::kF16>(bits); });
    case shard::DType::BF16: return each([](std::uint32_t bits) { return shard::narrow<shard::kBF16>(bits); });
    case shard::DType::F8E4M3: return each([](std::uint32_t bits) { return shard::narrow<shard::kE4M3>(bits); });
    case shard::DType::F8E5M2: return each([](std::uint32_t bits) { return shard::narrow<shard::kE5M2>(bits); });
    default: return each([](std::uint32_t bits) { return bits; });
  }
}
template <unsigned N>
GPU_CODE void cast_elements(std::uint64_t (&bits)[N], shard::DType from, shard::DType to) {
  std::uint32_t floats[N];
  to_floats(bits, from, to != shard::DType::F32, floats);
  from_floats(floats, to, bits);
}

/// One element's bits, byte by byte where it is not aligned.
GPU_CODE std::uint64_t load_bits(const std::byte* from, unsigned size, bool aligned) {
  if (!aligned) {
    std::uint64_t out = 0;
    for (unsigned i = 0; i < size; ++i) out |= std::uint64_t{static_cast<std::uint8_t>(from[i])} << 8 * i;
    return out;
  }
  switch (size) {
    case 1: return load_as<std::uint8_t>(from);
    case 2: return load_as<std::uint16_t>(from);
    case 4: return load_as<std::uint32_t>(from);
    default: return load_as<std::uint64_t>(from);
  }
}
GPU_CODE void store_bits(std::byte* to, unsigned size, bool aligned, std::uint64_t bits) {
  if (!aligned) {
    for (unsigned i = 0; i < size; ++i) to[i] = static_cast<std::byte>(bits >> 8 * i);
    return;
  }
  switch (size) {
    case 1: return store_as(to, static_cast<std::uint8_t>(bits));
    case 2: return store_as(to, static_cast<std::uint16_t>(bits));
    case 4: return store_as(to, static_cast<std::uint32_t>(bits));
    default: return store_as(to, bits);
  }
}

/// Four elements that lie together, aligned to their bytes, or to 16 where they are more.
GPU_CODE void load_four(const std::byte* from, unsigned size, std::uint64_t (&out)[4]) {
  switch (size) {
    case 1: {
      const auto all = load_as<std::uint32_t>(from);
      GPU_UNROLL
      for (unsigned i = 0; i < 4; ++i) out[i] = all >> 8 * i & 0xff;
      return;
    }
    case 2: {
      const auto all = load_as<std::uint64_t>(from);
      GPU_UNROLL
      for (unsigned i = 0; i < 4; ++i) out[i] = all >> 16 * i & 0xffff;
      return;
    }
    case 4: {
      const auto all = load_as<Wide>(from);
      GPU_UNROLL
      for (unsigned i = 0; i < 4; ++i) out[i] = all.word[i];
      return;
    }
    default:
      GPU_UNROLL
      for (unsigned half = 0; half < 2; ++half) {
        const auto all = load_as<Wide>(from + 16 * half);
        GPU_UNROLL
        for (unsigned i = 0; i < 2; ++i) out[2 * half + i] = all.word[2 * i] | std::uint64_t{all.word[2 * i + 1]} << 32;
      }
  }
}
GPU_CODE void store_four(std::byte* to, unsigned size, const std::uint64_t (&in)[4]) {
  switch (size) {
    case 1: return store_as(to, static_cast<std::uint32_t>(in[0] | in[1] << 8 | in[2] << 16 | in[3] << 24));
    case 2: return store_as(to, in[0] | in[1] << 16 | in[2] << 32 | in[3] << 48);
    case 4: {
      Wide all;
      GPU_UNROLL
      for (unsigned i = 0; i < 4; ++i) all.word[i] = static_cast<std::uint32_t>(in[i]);
      return store_as(to, all);
    }
    default:
      GPU_UNROLL
      for (unsigned half = 0; half < 2; ++half) {
        Wide all;
        GPU_UNROLL
        for (unsigned i = 0; i < 2; ++i) {
          all.word[2 * i] = static_cast<std::uint32_t>(in[2 * half + i]);
          all.word[2 * i + 1] = static_cast<std::uint32_t>(in[2 * half + i] >> 32);
        }
        store_as(to + 16 * half, all);
      }
  }
}

}  // namespace gpu::reshard
