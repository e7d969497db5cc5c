// Products in fp8: numbers of e4m3 with a factor for each block (lm/scaled_blocks.h says which blocks, and what they mean).
#pragma once

#include "gpu/ops/linear.h"

namespace gpu {

/// Activations: `numbers` F8E4M3 [rows, lanes]; scales[b·scale_pitch + row] for block b of a row, as cuBLASLt's blocks of 1 × 128 want them.
struct ScaledRows {
  View numbers;
  float* scales = nullptr;
  std::int64_t scale_pitch = 0;
  std::int64_t first = 0;                              ///< lane 0 lies so many lanes behind a block's start
};
/// A weight, or a part of one: `numbers` F8E4M3 [outputs, inputs]; scales[p·scale_pitch + b] for the block at block row p.
struct ScaledWeight {
  View numbers;
  const float* scales = nullptr;
  std::int64_t scale_pitch = 0;
  std::int64_t first_row = 0, first_column = 0;        ///< where its first number lies in the block of the first scale, each < 128
};

/// Block b of `x` becomes e4m3 with the scale of its largest magnitude; x F32 or BF16.
void quantise_rows(StreamView on, const View& x, const ScaledRows& out);

/// out[t, n] = Σ_b x_scale·w_scale·Σ_{k in b} x[t, k]·w[n, k] + bias[n], rounded once.
void scaled_linear(StreamView on, const ScaledRows& x, const ScaledWeight& w, const View& bias, const View& out);

/// Refuses blocks of activations that do not meet the weight's.
void check_scaled(const ScaledRows& x, const ScaledWeight& w);

/// Whether thin_scaled_linears() takes it: at most kThinRows rows, all in whole 16 bytes.
bool is_thin(const ScaledRows& x, const ScaledWeight& w);
/// What scaled_linear() makes, for several linears of one x at once; the same bits from run to run.
struct ScaledViews {
  ScaledWeight w;
  View bias, out;
};
void thin_scaled_linears(StreamView on, const ScaledRows& x, std::span<const ScaledViews> all);

/// As grouped_linear(), of weights in e4m3: `scales` [experts] point to each one's; `like` says how all of them lie, its data and scales are not used.
void grouped_scaled_linear(StreamView on, const ScaledRows& x, const ExpertWeights& w, const float* const* scales, const ScaledWeight& like, std::int64_t experts,
                           const std::int32_t* offsets, const std::int32_t* tiles, const float* row_weights, const View& out);

}  // namespace gpu
