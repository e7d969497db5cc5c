// Sums, factors, caps and activations. In place on the first view; computed in f32, stored in the view's type (F32 or BF16).
#pragma once

#include "gpu/runtime.h"
#include "gpu/view.h"
#include "libshard/transformer_config.h"

namespace gpu {

/// a += b.
void add(StreamView on, const View& a, const View& b);
/// a *= factor.
void scale(StreamView on, const View& a, double factor);
/// c·tanh(x/c); 0: nothing.
void softcap(StreamView on, const View& a, double cap);

/// What a feed-forward's activation needs of the model's configuration.
struct ActivationConfig {
  shard::Activation kind = shard::Activation::Silu;
  double alpha = 1.702;  ///< of QuickGelu
  double offset = 0;     ///< added to `up` before the product
  bool clamped = false;
  double clamp = 0;  ///< gate ≤ clamp, |up| ≤ clamp
};
ActivationConfig activation_config(const shard::TransformerConfig& config);
/// In place on `up`: act(gate)·(up + offset); `gate` none: act(up). gate and up may be columns of one matrix.
void activate(StreamView on, const ActivationConfig& config, const View& gate, const View& up);

/// x[r, c] *= w[r].
void scale_rows(StreamView on, const View& x, const float* w);
/// x[r, c] += bias[c]·w[r].
void add_weighted_bias(StreamView on, const View& x, const View& bias, const float* w);
/// x[r, c] *= 1/(1 + e^(−gate[r, 0])).
void gate_rows(StreamView on, const View& x, const View& gate);

/// to = from in to's type, rounded to nearest even; F32, BF16 and F16.
void convert(StreamView on, const View& to, const View& from);
/// Every element becomes `value`.
void fill(StreamView on, const View& to, float value);

}  // namespace gpu
