// What products in fp8 take: numbers of e4m3 with one f32 factor for each block, as DeepSeek-V3's checkpoints hold weights and its kernels activations.
#pragma once

#include "lm/tensor.h"

#include <limits>
#include <string>
#include <string_view>

namespace lm {

/// Weights have blocks of so many rows and columns, activations of so many lanes of one row.
constexpr Index kScaleBlock = 128;
/// The largest e4m3.
constexpr float kLargestE4M3 = 448;

/// Whether Compute::Fp8 takes this weight so: a layer's linears, whatever its experts; not routers, norms, embeddings, heads and eh_proj.
bool is_block_scaled(std::string_view name);
/// The name of its scales [⌈rows/128⌉, ⌈columns/128⌉], which is no tensor of a checkpoint.
inline std::string scales_of(std::string_view weight) { return std::string(weight) + "_scale"; }
/// The weight whose scales these are; empty where it names none.
std::string_view weight_of_scales(std::string_view name);

/// Blocks that `count` numbers touch, the first of which lies `first` numbers behind a block's start.
constexpr Index blocks_of(Index count, Index first = 0) { return count ? (first + count - 1) / kScaleBlock + 1 : 0; }

/// What numbers up to `max_abs` are divided by before they are rounded.
constexpr float scale_for(float max_abs) {
  constexpr float kLeast = std::numeric_limits<float>::min();  // what is smaller has no quotient that is right to three bits
  const float scale = max_abs / kLargestE4M3;
  return max_abs > 0 ? scale > kLeast ? scale : kLeast : 1.0f;
}

/// A block row of a weight: `rows` ≤ 128 rows of `columns` f32, row after row, become e4m3, and `scales` [⌈columns/128⌉]. Whatever is not finite becomes
/// NaN, with what shares its block if it is infinite.
void quantise_block_row(const float* from, Index rows, Index columns, std::byte* numbers, float* scales);

/// Activations as products in fp8 see them, in place: each row's numbers divided by their block's scale, rounded to e4m3, multiplied again. Lane 0
/// lies `first` lanes behind a block's start.
void round_e4m3_blocks(float* row, Index columns, Index first);

/// The numbers of a block-scaled weight times their scales, [rows, columns] in f32.
void widen_scaled(const Weight& weight, const Weight& scales, Index lo, Index hi, float* to);

}  // namespace lm
