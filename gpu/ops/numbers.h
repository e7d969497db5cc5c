// Elements in kernels: storage types, their widening to f32 and rounding from it (to nearest even), several at once.
#pragma once

#include "gpu/kernel.h"
#include "gpu/view.h"
#include "libshard/float_bits.h"

#include <bit>
#include <cmath>
#include <limits>

namespace gpu {

struct Bf16 {
  std::uint16_t bits;
};
struct F16 {
  std::uint16_t bits;
};

GPU_CODE float as_float(std::uint32_t bits) { return std::bit_cast<float>(bits); }
GPU_CODE std::uint32_t as_bits(float value) { return std::bit_cast<std::uint32_t>(value); }

GPU_CODE float widen(float value) { return value; }
GPU_CODE float widen(Bf16 value) { return as_float(static_cast<std::uint32_t>(value.bits) << 16); }
GPU_CODE float widen(F16 value) { return as_float(shard::widen<shard::kF16>(value.bits)); }

template <typename T>
GPU_CODE T narrow(float value) {
  if constexpr (std::is_same_v<T, float>) {
    return value;
  } else if constexpr (std::is_same_v<T, Bf16>) {
#ifdef __CUDA_ARCH__
    std::uint16_t bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return {bits};
#else
    return {static_cast<std::uint16_t>(shard::narrow<shard::kBF16>(as_bits(value)))};
#endif
  } else {
    return {static_cast<std::uint16_t>(shard::narrow<shard::kF16>(as_bits(value)))};
  }
}
/// The value that T would hold.
template <typename T>
GPU_CODE float rounded(float value) {
  return widen(narrow<T>(value));
}

/// A NaN as `b` is passed over, as the CPU's maxima do.
GPU_CODE float larger(float a, float b) {
#ifdef __CUDA_ARCH__
  return fmaxf(a, b);  // one instruction
#else
  return b > a ? b : a;
#endif
}
GPU_CODE float lowest() { return -std::numeric_limits<float>::infinity(); }
GPU_CODE bool finite(float value) { return (as_bits(value) & 0x7f800000u) != 0x7f800000u; }
GPU_CODE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

/// N elements that move as one.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T item[N];
};
template <int N, typename T>
GPU_CODE Pack<T, N> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, N>*>(from);
}
template <int N, typename T>
GPU_CODE void store_pack(T* to, const Pack<T, N>& pack) {
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
}
/// As many as 16 bytes hold.
template <typename T>
constexpr int kPack = 16 / sizeof(T);

/// Elements whose type is known when the kernel runs: weights, and vectors of few numbers.
struct Numbers {
  const std::byte* data = nullptr;
  shard::DType type = shard::DType::F32;

  Numbers() = default;
  explicit Numbers(const View& view) : data(view.data), type(view.type) {}
  GPU_CODE Numbers(const std::byte* first, shard::DType of) : data(first), type(of) {}
  GPU_CODE bool given() const { return data != nullptr; }
  GPU_CODE float operator[](std::int64_t i) const {
    const auto* halves = reinterpret_cast<const std::uint16_t*>(data);
    const auto* bytes = reinterpret_cast<const std::uint8_t*>(data);
    switch (type) {
      case shard::DType::F32: return reinterpret_cast<const float*>(data)[i];
      case shard::DType::BF16: return widen(Bf16{halves[i]});
      case shard::DType::F16: return widen(F16{halves[i]});
      case shard::DType::F8E4M3: return as_float(shard::widen<shard::kE4M3>(bytes[i]));
      case shard::DType::F8E5M2: return as_float(shard::widen<shard::kE5M2>(bytes[i]));
      default: return std::numeric_limits<float>::quiet_NaN();
    }
  }
  /// Elements i … i+N−1 as f32; i a multiple of N and the data aligned to N elements.
  template <int N>
  GPU_CODE void read(std::int64_t i, float* out) const {
    if (type == shard::DType::F32) {
      const auto pack = load_pack<N>(reinterpret_cast<const float*>(data) + i);
      for (int j = 0; j < N; ++j) out[j] = pack.item[j];
    } else if (type == shard::DType::BF16) {
      const auto pack = load_pack<N>(reinterpret_cast<const Bf16*>(data) + i);
      for (int j = 0; j < N; ++j) out[j] = widen(pack.item[j]);
    } else {
      for (int j = 0; j < N; ++j) out[j] = (*this)[i + j];
    }
  }
};

/// Where results go, of a type known when the kernel runs: F32 or BF16.
struct Results {
  std::byte* data = nullptr;
  shard::DType type = shard::DType::F32;

  GPU_CODE void set(std::int64_t i, float value) const {
    if (type == shard::DType::F32) reinterpret_cast<float*>(data)[i] = value;
    else reinterpret_cast<Bf16*>(data)[i] = narrow<Bf16>(value);
  }
  /// The value that set() would store.
  GPU_CODE float as_stored(float value) const { return type == shard::DType::F32 ? value : rounded<Bf16>(value); }
};

// What the host checks and chooses before a launch.

/// Calls body(T{}) for the storage type of activations.
template <typename Body>
void with_activation_type(shard::DType type, Body&& body) {
  if (type == shard::DType::F32) return body(float{});
  shard::require(type == shard::DType::BF16, shard::Code::Device, [&] { return fmt::format("device: activations of type {}", shard::name(type)); });
  body(Bf16{});
}
inline bool is_number_type(shard::DType type) {
  using enum shard::DType;
  return type == F32 || type == BF16 || type == F16 || type == F8E4M3 || type == F8E5M2;
}
inline Numbers numbers(const View& view) {
  shard::require(!view || is_number_type(view.type), shard::Code::Device,
                 [&] { return fmt::format("device: weights of type {}", shard::name(view.type)); });
  return Numbers(view);
}
inline Results results(const View& view) {
  shard::require(view.type == shard::DType::F32 || view.type == shard::DType::BF16, shard::Code::Device,
                 [&] { return fmt::format("device: activations of type {}", shard::name(view.type)); });
  return {view.data, view.type};
}
/// Whether every row of a view can be taken N elements at a time.
inline bool in_packs(const View& view, int n) {
  const auto bytes = static_cast<std::uint64_t>(n) * shard::size_of(view.type);
  return !view || (view.columns % n == 0 && (view.rows <= 1 || view.stride % n == 0) && reinterpret_cast<std::uintptr_t>(view.data) % bytes == 0);
}
template <typename T>
T* elements(const View& view) {
  return reinterpret_cast<T*>(view.data);
}

}  // namespace gpu
