// Functions of single floats that vectorise: exp, bf16 rounding, the activations.
#pragma once

#include "libshard/float_bits.h"

#include <bit>
#include <cmath>
#include <cstdint>

namespace lm::cpu {

/// e^x within 1 ULP or so for x in [−87, 88.7]; beyond, the value at that end. NaN stays.
SHARD_INLINE float exp_f32(float x) {
  float clamped = x < -87.0f ? -87.0f : x;
  clamped = clamped > 88.7f ? 88.7f : clamped;
  // Adding 1.5·2^23 leaves the nearest integer in the lowest bits.
  const float shifted = clamped * 1.44269504f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // In two steps: 2^128 is no float, though 0.7·2^128 is.
  const auto whole = std::bit_cast<std::int32_t>(shifted) - 0x4b400000, half = whole >> 1;
  return p * std::bit_cast<float>((half + 127) << 23) * std::bit_cast<float>((whole - half + 127) << 23);
}

SHARD_INLINE float round_bf16(float value) {
  return std::bit_cast<float>(shard::narrow<shard::kBF16>(std::bit_cast<std::uint32_t>(value)) << 16);
}

SHARD_INLINE float sigmoid(float x) { return 1.0f / (1.0f + exp_f32(-x)); }
SHARD_INLINE float tanh_f32(float x) {
  // Near 0 the quotient loses digits that the series has.
  const float small = x * (1.0f + x * x * (-0.333333333f + x * x * 0.133333333f));
  const float large = 1.0f - 2.0f / (exp_f32(2.0f * x) + 1.0f);
  return x < 0.04f && x > -0.04f ? small : large;
}

/// The largest of n > 0 numbers; NaNs are passed over.
float max_of(const float* x, std::int64_t n);

}  // namespace lm::cpu
