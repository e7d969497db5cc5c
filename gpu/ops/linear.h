// Products of activations and weights, without a library: what they mean, the fallback where cuBLASLt is absent, and those of experts.
// Where both sides are bf16 tensor cores are used; sums are f32 in any case.
#pragma once

#include "gpu/runtime.h"
#include "gpu/view.h"

#include <span>

namespace gpu {

/// out[t, n] = Σ_k x[t, k]·w[n, k] + bias[n], summed in f32 and rounded once; `bias` [n] or none. A part of a wider output is
/// out.column_range(…).
void linear(StreamView on, const View& x, const View& w, const View& bias, const View& out);

/// Refuses what linear() cannot be of these shapes.
void check_linear(const View& x, const View& w, const View& bias, const View& out);

/// A linear of at most kThinRows rows is bound by the reading of its weights.
constexpr std::int64_t kThinRows = 16;
/// Whether thin_linears() takes it: both are bf16, in rows of whole packs.
bool is_thin(const View& x, const View& w);
/// What linear() makes, for several linears of one x at once; the same bits from run to run.
struct LinearViews {
  View w, bias, out;
};
void thin_linears(StreamView on, const View& x, std::span<const LinearViews> all);

/// Weights of experts, each [outputs, inputs] in memory of its own; the pointers lie on the device.
struct ExpertWeights {
  const std::byte* const* data = nullptr;
  const std::byte* const* bias = nullptr;  ///< or none
  shard::DType type = shard::DType::F32;   ///< of both
  std::int64_t outputs = 0, inputs = 0, stride = 0;
};
/// The linear of every expert on its rows of x: rows offsets[e] … offsets[e+1]−1 as gpu/ops/route.h makes them, with `tiles`. With
/// `row_weights` the product is rounded first and bias·row_weights[r] added then, as Megatron's second linear of an expert does.
void grouped_linear(StreamView on, const View& x, const ExpertWeights& w, std::int64_t experts, const std::int32_t* offsets,
                    const std::int32_t* tiles, const float* row_weights, const View& out);

/// out[b, h] = x[b, h]·w[b, (first + h)/ratio]ᵀ for every b of `outer` and h of `inner`. Strides in elements; `k_stride` of w 1, or its
/// row stride where w is stored transposed.
struct BatchedProduct {
  View x, w, out;  ///< of the first b and h; rows and columns are those of one product, w's as [n, k]
  std::int64_t outer = 1, inner = 1, first = 0, ratio = 1;
  std::int64_t x_outer = 0, x_inner = 0, w_outer = 0, w_inner = 0, out_outer = 0, out_inner = 0;
  std::int64_t w_k_stride = 1;
};
void batched_product(StreamView on, const BatchedProduct& product);

}  // namespace gpu
