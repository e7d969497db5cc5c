// Bit patterns of the floating types narrower than f64, free of branches so that loops over them vectorise.
// Knows no spans and checks nothing. Kernels of devices are made of the same functions.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

// One function for several instruction sets, picked when the program loads. It takes glibc; sanitizers are
// not up yet when it picks.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SHARD_SANITIZED
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) || __has_feature(memory_sanitizer)
#define SHARD_SANITIZED
#endif
#endif
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(SHARD_SANITIZED)
#if defined(__clang__) || __GNUC__ >= 12
#define SHARD_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))  // whoever made the processor
#else
#define SHARD_CLONES __attribute__((target_clones("arch=skylake-avx512", "avx2", "default")))
#endif
#else
#define SHARD_CLONES
#endif
#ifdef __CUDACC__
#define SHARD_INLINE __host__ __device__ __forceinline__
#else
#define SHARD_INLINE __attribute__((always_inline)) inline  // a call would leave the clone's instruction set
#endif

namespace shard {

/// Widths of exponent and mantissa beside one bit of sign.
struct Form {
  int exponent, mantissa;
  bool no_infinity = false;  ///< only all ones is NaN; its neighbours are numbers
  constexpr int bias() const { return (1 << (exponent - 1)) - 1; }
  constexpr std::uint32_t magnitude() const { return (1u << (exponent + mantissa)) - 1; }
  constexpr std::uint32_t infinity() const { return ((1u << exponent) - 1) << mantissa; }
  constexpr std::uint32_t nan() const {
    return no_infinity ? magnitude() : infinity() | 1u << (mantissa - 1);
  }
  /// What a number too large becomes.
  constexpr std::uint32_t overflow() const { return no_infinity ? nan() : infinity(); }
};
constexpr Form kF16{5, 10}, kBF16{8, 7}, kE4M3{4, 3, true}, kE5M2{5, 2};

template <typename T>
SHARD_INLINE T load(const std::byte* from) {
  T out;
  std::memcpy(&out, from, sizeof out);
  return out;
}
template <typename T>
SHARD_INLINE void store(std::byte* to, T value) {
  std::memcpy(to, &value, sizeof value);
}

/// `yes` where the condition holds. As masks: a branch around floating point would keep loops from
/// vectorising.
SHARD_INLINE constexpr std::uint32_t pick(bool condition, std::uint32_t yes, std::uint32_t no) {
  const auto mask = -static_cast<std::uint32_t>(condition);
  return (yes & mask) | (no & ~mask);
}

/// The bits of a float of the same value; exact, since f32 holds every value of every smaller type.
template <Form form>
SHARD_INLINE constexpr std::uint32_t widen(std::uint32_t bits) {
  const std::uint32_t sign = (bits & ~form.magnitude()) << (31 - form.exponent - form.mantissa);
  const std::uint32_t magnitude = (bits & form.magnitude()) << (23 - form.mantissa);
  if constexpr (form.exponent == 8) return sign | magnitude;
  // As f32 the bits are the number times a power of two, subnormals included.
  constexpr auto scale = std::bit_cast<float>(static_cast<std::uint32_t>(254 - form.bias()) << 23);
  const auto scaled = std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) * scale);
  constexpr std::uint32_t special = (form.no_infinity ? form.nan() : form.infinity()) << (23 - form.mantissa);
  return sign | pick(magnitude >= special, magnitude | 0x7f800000u, scaled);
}

/// The float of the given bits rounded to the form, to nearest even.
template <Form form>
SHARD_INLINE constexpr std::uint32_t narrow(std::uint32_t bits) {
  constexpr int drop = 23 - form.mantissa;
  const std::uint32_t sign = bits >> 31 << (form.exponent + form.mantissa), magnitude = bits & 0x7fffffffu;
  const std::uint32_t even = magnitude >> drop & 1;
  std::uint32_t out = (magnitude + ((1u << (drop - 1)) - 1) + even) >> drop;
  if constexpr (form.exponent != 8) {
    constexpr auto rebias = static_cast<std::uint32_t>(127 - form.bias());
    out -= rebias << form.mantissa;
    // Adding a number whose last bit weighs as much as the form's smallest lets the FPU round subnormals.
    constexpr auto anchor = static_cast<std::uint32_t>(151 - form.bias() - form.mantissa) << 23;
    const auto sum = std::bit_cast<float>(magnitude) + std::bit_cast<float>(anchor);
    const std::uint32_t subnormal = std::bit_cast<std::uint32_t>(sum) - anchor;
    out = pick(magnitude < (rebias + 1) << 23, subnormal, out);
    out = pick(out >= form.overflow(), form.overflow(), out);
  }
  if constexpr (form.exponent == 8) return magnitude > 0x7f800000u ? sign | form.nan() : sign | out;
  return sign | pick(magnitude > 0x7f800000u, form.nan(), out);
}

/// The bits of a float that rounds to any smaller form as the double does: to odd, so that no tie is made up.
SHARD_INLINE std::uint32_t to_odd_float(double value) {
  const auto near = static_cast<float>(value);
  const auto back = static_cast<double>(near);
  const auto bits = std::bit_cast<std::uint32_t>(near);
  constexpr std::uint64_t magnitude = ~std::uint64_t{0} >> 1;
  const bool above =
      (std::bit_cast<std::uint64_t>(back) & magnitude) > (std::bit_cast<std::uint64_t>(value) & magnitude);
  const std::uint32_t odd = pick(bits & 1, bits, pick(above, bits - 1, bits + 1));
  return pick((back < value) | (back > value), odd, bits);
}

}  // namespace shard
