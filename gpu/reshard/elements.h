// Casts of elements in kernels: the functions of libshard/float_bits.h, instructions of the device where these round alike, and what the
// host's processor does with NaN spelled out, since devices have a NaN of their own.
#pragma once

#include "gpu/kernel.h"
#include "libshard/dtype.h"
#include "libshard/float_bits.h"

#include <bit>
#include <type_traits>

namespace gpu::reshard {

/// Bytes that move together: up to 16 in one instruction.
template <unsigned kBytes>
struct alignas(kBytes < 16 ? kBytes : 16) Bytes {
  using Word = std::conditional_t<kBytes >= 4, std::uint32_t, std::conditional_t<kBytes == 2, std::uint16_t, std::uint8_t>>;
  Word word[kBytes / sizeof(Word)];
};
using Wide = Bytes<16>;

template <typename T>
GPU_CODE T load_as(const std::byte* from) {
  return *reinterpret_cast<const T*>(from);
}
template <typename T>
GPU_CODE void store_as(std::byte* to, T value) {
  *reinterpret_cast<T*>(to) = value;
}
/// Byte by byte, from and to any address.
template <typename T>
GPU_CODE T load_unaligned(const std::byte* from) {
  T out{};
  GPU_UNROLL
  for (unsigned i = 0; i < sizeof(T); ++i) out.word[i / sizeof(out.word[0])] |= static_cast<typename T::Word>(std::uint32_t{static_cast<std::uint8_t>(from[i])} << 8 * (i % sizeof(out.word[0])));
  return out;
}
template <typename T>
GPU_CODE void store_unaligned(std::byte* to, const T& value) {
  GPU_UNROLL
  for (unsigned i = 0; i < sizeof(T); ++i) to[i] = static_cast<std::byte>(value.word[i / sizeof(value.word[0])] >> 8 * (i % sizeof(value.word[0])));
}

/// Element `i`, of kSize bytes each. In registers only where `i` is a constant.
template <unsigned kSize, unsigned kBytes>
GPU_CODE auto element(const Bytes<kBytes>& all, unsigned i) {
  if constexpr (kSize == 8) {
    return all.word[2 * i] | std::uint64_t{all.word[2 * i + 1]} << 32;
  } else {
    constexpr unsigned each = sizeof(all.word[0]) / kSize;
    return static_cast<std::uint32_t>(all.word[i / each]) >> 8 * kSize * (i % each) & 0xffffffffu >> (32 - 8 * kSize);
  }
}
/// Puts element `i` where there were zeros.
template <unsigned kSize, unsigned kBytes>
GPU_CODE void put_element(Bytes<kBytes>& all, unsigned i, std::uint64_t bits) {
  using Word = typename Bytes<kBytes>::Word;
  if constexpr (kSize == 8) {
    all.word[2 * i] = static_cast<std::uint32_t>(bits);
    all.word[2 * i + 1] = static_cast<std::uint32_t>(bits >> 32);
  } else {
    constexpr unsigned each = sizeof(Word) / kSize;
    all.word[i / each] = static_cast<Word>(all.word[i / each] | static_cast<std::uint32_t>(bits) << 8 * kSize * (i % each));
  }
}

/// Bytes of an element that kernels cast, or of an unsigned integer.
constexpr unsigned size_in_kernel(shard::DType type) {
  switch (type) {
    case shard::DType::F64:
    case shard::DType::U64: return 8;
    case shard::DType::F32:
    case shard::DType::U32: return 4;
    case shard::DType::F16:
    case shard::DType::BF16:
    case shard::DType::U16: return 2;
    default: return 1;
  }
}
constexpr bool is_narrow(shard::DType type) { return size_in_kernel(type) < 4; }  ///< than f32
constexpr shard::Form form_of(shard::DType type) {
  switch (type) {
    case shard::DType::F16: return shard::kF16;
    case shard::DType::BF16: return shard::kBF16;
    case shard::DType::F8E4M3: return shard::kE4M3;
    default: return shard::kE5M2;
  }
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

/// An element's bits as those of a float. `kOdd`: what follows is narrower than f32.
template <shard::DType kFrom, bool kOdd, typename Bits>
GPU_CODE std::uint32_t to_float(Bits bits) {
  if constexpr (kFrom == shard::DType::F64) return float_of_double(bits, kOdd);
  else if constexpr (is_narrow(kFrom)) return shard::widen<form_of(kFrom)>(bits);
  else return bits;
}
template <shard::DType kTo>
GPU_CODE auto from_float(std::uint32_t bits) {
  if constexpr (kTo == shard::DType::F64) return double_of_float(bits);
  else if constexpr (is_narrow(kTo)) return shard::narrow<form_of(kTo)>(bits);
  else return bits;
}

#ifdef __CUDA_ARCH__
constexpr bool has_instruction(shard::DType to) { return is_narrow(to) && (size_in_kernel(to) == 2 || __CUDA_ARCH__ >= 890); }
/// The largest magnitude that the instruction rounds as narrow() does: infinity is the same, NaN is not; those of fp8 make the largest
/// number of everything beyond it.
constexpr float instruction_limit(shard::DType to) {
  if (to == shard::DType::F8E4M3) return 464;                                          // a tie that rounds down
  if (to == shard::DType::F8E5M2) return std::bit_cast<float>(std::uint32_t{0x476fffff});  // 61440 is a tie that rounds up
  return std::bit_cast<float>(std::uint32_t{0x7f800000});
}
template <shard::DType kTo>
GPU_CODE std::uint32_t rounded_pair(float low, float high) {
  std::uint32_t pair;
  std::uint16_t bytes;
  if constexpr (kTo == shard::DType::F16) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
  } else if constexpr (kTo == shard::DType::BF16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
  } else if constexpr (kTo == shard::DType::F8E4M3) {
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(bytes) : "f"(high), "f"(low));
    return bytes;
  } else {
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(bytes) : "f"(high), "f"(low));
    return bytes;
  }
}
#endif

/// Elements side by side, as shard::cast() makes them.
template <shard::DType kFrom, shard::DType kTo, unsigned kCount>
GPU_CODE Bytes<kCount * size_in_kernel(kTo)> cast_elements(const Bytes<kCount * size_in_kernel(kFrom)>& in) {
  constexpr auto kSize = size_in_kernel(kTo);
  if constexpr (kFrom == kTo) return in;
  else {
    Bytes<kCount * kSize> out{};
    std::uint32_t floats[kCount];
    GPU_UNROLL
    for (unsigned i = 0; i < kCount; ++i) floats[i] = to_float<kFrom, kTo != shard::DType::F32>(element<size_in_kernel(kFrom)>(in, i));
#ifdef __CUDA_ARCH__
    if constexpr (has_instruction(kTo) && kCount % 2 == 0) {
      bool beyond = false;
      GPU_UNROLL
      for (unsigned i = 0; i < kCount; ++i) beyond |= !(fabsf(std::bit_cast<float>(floats[i])) <= instruction_limit(kTo));
      if (!beyond) {
        GPU_UNROLL
        for (unsigned i = 0; i < kCount; i += 2) put_element<2 * kSize>(out, i / 2, rounded_pair<kTo>(std::bit_cast<float>(floats[i]), std::bit_cast<float>(floats[i + 1])));
        return out;
      }
    }
#endif
    GPU_UNROLL
    for (unsigned i = 0; i < kCount; ++i) put_element<kSize>(out, i, from_float<kTo>(floats[i]));
    return out;
  }
}

template <shard::DType kType>
using Type = std::integral_constant<shard::DType, kType>;

/// body(Type<…>) for one of the types that are cast.
template <typename Body>
GPU_CODE void with_floating_type(shard::DType type, Body&& body) {
  switch (type) {
    case shard::DType::F64: return body(Type<shard::DType::F64>{});
    case shard::DType::F32: return body(Type<shard::DType::F32>{});
    case shard::DType::F16: return body(Type<shard::DType::F16>{});
    case shard::DType::BF16: return body(Type<shard::DType::BF16>{});
    case shard::DType::F8E4M3: return body(Type<shard::DType::F8E4M3>{});
    default: return body(Type<shard::DType::F8E5M2>{});
  }
}
/// body(Type<from>, Type<to>) for two that differ: the pair is known where elements are cast.
template <typename Body>
GPU_CODE void with_cast(shard::DType from, shard::DType to, Body&& body) {
  with_floating_type(from, [&]<shard::DType kFrom>(Type<kFrom> source) {
    with_floating_type(to, [&]<shard::DType kTo>(Type<kTo> target) {
      if constexpr (kFrom != kTo) body(source, target);
    });
  });
}

}  // namespace gpu::reshard
