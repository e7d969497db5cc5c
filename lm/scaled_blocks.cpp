// Magnitudes first, then a division and one rounding for each number; the loops over numbers are libshard's casts.
#include "lm/scaled_blocks.h"

#include "libshard/float_bits.h"
#include "libshard/numeric.h"

#include <algorithm>
#include <array>
#include <cmath>

namespace lm {
namespace {

using shard::DType;

constexpr std::string_view kWeight = ".weight", kScales = ".weight_scale";

/// The largest magnitude; NaNs are passed over.
SHARD_CLONES float max_magnitude(const float* from, Index count, float so_far) {
  for (Index i = 0; i < count; ++i) {
    const float magnitude = __builtin_fabsf(from[i]);
    so_far = magnitude > so_far ? magnitude : so_far;
  }
  return so_far;
}

SHARD_CLONES void divide(const float* from, Index count, float by, float* to) {
  for (Index i = 0; i < count; ++i) to[i] = from[i] / by;
}
SHARD_CLONES void multiply(float* x, Index count, float by) {
  for (Index i = 0; i < count; ++i) x[i] *= by;
}

void to_e4m3(const float* from, Index count, std::byte* to) {
  shard::cast(std::as_bytes(std::span(from, static_cast<std::size_t>(count))), DType::F32, {to, static_cast<std::size_t>(count)}, DType::F8E4M3);
}
void from_e4m3(const std::byte* from, Index count, float* to) {
  shard::cast({from, static_cast<std::size_t>(count)}, DType::F8E4M3, std::as_writable_bytes(std::span(to, static_cast<std::size_t>(count))), DType::F32);
}

}  // namespace

bool is_block_scaled(std::string_view name) {
  if (!name.ends_with(kWeight)) return false;
  name.remove_suffix(kWeight.size());
  constexpr std::string_view kAttention[] = {"attention.q", "attention.k", "attention.v", "attention.out", "attention.q_down", "attention.q_up", "attention.kv_down", "attention.kv_up"};
  for (const auto linear : kAttention)
    if (name.ends_with(linear)) return true;
  return name.find("mlp.") != name.npos && (name.ends_with(".gate") || name.ends_with(".up") || name.ends_with(".down"));
}

std::string_view weight_of_scales(std::string_view name) {
  if (!name.ends_with(kScales)) return {};
  name.remove_suffix(kScales.size() - kWeight.size());
  return is_block_scaled(name) ? name : std::string_view{};
}

void quantise_block_row(const float* from, Index rows, Index columns, std::byte* numbers, float* scales) {
  std::array<float, kScaleBlock> scaled;
  for (Index at = 0; at < columns; at += kScaleBlock, ++scales) {
    const auto width = std::min(kScaleBlock, columns - at);
    float most = 0;
    for (Index r = 0; r < rows; ++r) most = max_magnitude(from + r * columns + at, width, most);
    *scales = scale_for(most);
    for (Index r = 0; r < rows; ++r) {
      divide(from + r * columns + at, width, *scales, scaled.data());
      to_e4m3(scaled.data(), width, numbers + r * columns + at);
    }
  }
}

void round_e4m3_blocks(float* row, Index columns, Index first) {
  std::array<std::byte, kScaleBlock> small;
  for (Index at = 0; at < columns;) {
    const auto width = std::min(kScaleBlock - (first + at) % kScaleBlock, columns - at);
    const auto scale = scale_for(max_magnitude(row + at, width, 0));
    divide(row + at, width, scale, row + at);
    to_e4m3(row + at, width, small.data());
    from_e4m3(small.data(), width, row + at);
    multiply(row + at, width, scale);
    at += width;
  }
}

void widen_scaled(const Weight& weight, const Weight& scales, Index lo, Index hi, float* to) {
  for (Index r = lo; r < hi; ++r, to += weight.columns) {
    from_e4m3(weight.data + r * weight.stride, weight.columns, to);
    const auto block_row = (weight.first_row + r) / kScaleBlock - scales.first_row;
    for (Index at = 0; at < weight.columns;) {
      const auto column = weight.first_column + at, width = std::min(kScaleBlock - column % kScaleBlock, weight.columns - at);
      multiply(to + at, width, scales.at(block_row, column / kScaleBlock - scales.first_column));
      at += width;
    }
  }
}

}  // namespace lm
