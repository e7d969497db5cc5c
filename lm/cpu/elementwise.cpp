// Norms, activations and sums: row by row, statistics in f32.
#include "lm/cpu/numbers.h"
#include "lm/cpu/workers.h"
#include "lm/cpu/ops.h"
#include "libshard/error.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace lm::cpu {

SHARD_CLONES float max_of(const float* x, Index n) {
  typedef float Lanes __attribute__((vector_size(64), aligned(4), may_alias));
  Lanes most;
  for (int l = 0; l < 16; ++l) most[l] = -std::numeric_limits<float>::infinity();
  Index i = 0;
  for (; i + 16 <= n; i += 16) {
    const auto some = *reinterpret_cast<const Lanes*>(x + i);
    most = some > most ? some : most;
  }
  float lanes[16], out = -std::numeric_limits<float>::infinity();
  std::memcpy(lanes, &most, sizeof lanes);
  for (; i < n; ++i) out = x[i] > out ? x[i] : out;
  for (const auto lane : lanes) out = lane > out ? lane : out;
  return out;
}

}  // namespace lm::cpu

namespace lm::cpu {
namespace {

using cpu::round_bf16;

/// Σx and Σ(x−shift)² in sixteen lanes, so that the order of additions is the same for every instruction set.
SHARD_CLONES double sum_of(const float* x, Index n) {
  double lanes[16] = {};
  Index i = 0;
  for (; i + 16 <= n; i += 16)
    for (int l = 0; l < 16; ++l) lanes[l] += static_cast<double>(x[i + l]);
  double sum = 0;
  for (const double lane : lanes) sum += lane;
  for (; i < n; ++i) sum += static_cast<double>(x[i]);
  return sum;
}
SHARD_CLONES double squares_of(const float* x, Index n, float shift) {
  double lanes[16] = {};
  Index i = 0;
  for (; i + 16 <= n; i += 16)
    for (int l = 0; l < 16; ++l) {
      const auto d = static_cast<double>(x[i + l] - shift);
      lanes[l] += d * d;
    }
  double sum = 0;
  for (const double lane : lanes) sum += lane;
  for (; i < n; ++i) sum += static_cast<double>(x[i] - shift) * static_cast<double>(x[i] - shift);
  return sum;
}

SHARD_CLONES void round_all(float* values, Index count) {
  for (Index i = 0; i < count; ++i) values[i] = round_bf16(values[i]);
}

struct NormWeights {
  std::vector<float> weight, bias;
  NormWeights(const Weight& w, const Weight& b, Index width, bool zero_centered) {
    for (const auto* given : {&w, &b})
      shard::require(!*given || given->columns * given->rows == width, shard::Code::Mismatch,
                     [&] { return fmt::format("model: a norm over {} features has {} weights", width, given->columns * given->rows); });
    if (w)
      for (Index i = 0; i < width; ++i) weight.push_back(w.at(0, i) + (zero_centered ? 1.0f : 0.0f));
    if (b)
      for (Index i = 0; i < width; ++i) bias.push_back(b.at(0, i));
  }
};

/// Types that scale after the cast (Llama's) and before it (zero-centred ones) differ in bf16 only.
SHARD_CLONES void apply_norm(const float* x, float* y, Index n, float mean, float factor, const float* weight, const float* bias, bool bf16,
                             bool cast_first) {
  // One simple loop a step: a switch inside would keep them from vectorising.
  for (Index i = 0; i < n; ++i) y[i] = (x[i] - mean) * factor;
  if (bf16 && cast_first)
    for (Index i = 0; i < n; ++i) y[i] = round_bf16(y[i]);
  if (weight)
    for (Index i = 0; i < n; ++i) y[i] *= weight[i];
  if (bias)
    for (Index i = 0; i < n; ++i) y[i] += bias[i];
  if (bf16)
    for (Index i = 0; i < n; ++i) y[i] = round_bf16(y[i]);
}

void norm_row(const Context& on, const float* x, float* y, Index n, shard::Normalization kind, double epsilon, bool zero_centered,
              const NormWeights& weights) {
  const bool layer = kind == shard::Normalization::LayerNorm;
  const auto mean = layer ? static_cast<float>(sum_of(x, n) / static_cast<double>(n)) : 0.0f;
  const auto variance = squares_of(x, n, mean) / static_cast<double>(n);
  apply_norm(x, y, n, mean, static_cast<float>(1.0 / std::sqrt(variance + epsilon)), weights.weight.empty() ? nullptr : weights.weight.data(),
             weights.bias.empty() ? nullptr : weights.bias.data(), rounds_to_bf16(on.compute), !layer && !zero_centered);
}

SHARD_CLONES void silu_gate(const float* gate, float* up, Index n, float offset, bool bf16) {
  if (bf16)
    for (Index i = 0; i < n; ++i) up[i] = round_bf16(round_bf16(gate[i] * cpu::sigmoid(gate[i])) * (up[i] + offset));
  else
    for (Index i = 0; i < n; ++i) up[i] = gate[i] * cpu::sigmoid(gate[i]) * (up[i] + offset);
}

float activation(const shard::TransformerConfig& config, float x) {
  switch (config.activation) {
    case shard::Activation::Silu: return x * cpu::sigmoid(x);
    case shard::Activation::GeluErf: return 0.5f * x * (1.0f + std::erf(x * 0.70710678118654752f));
    case shard::Activation::GeluTanh: return 0.5f * x * (1.0f + std::tanh(0.79788456080286536f * x * (1.0f + 0.044715f * x * x)));
    case shard::Activation::Relu: return std::max(x, 0.0f);
    case shard::Activation::SquaredRelu: return std::max(x, 0.0f) * std::max(x, 0.0f);
    case shard::Activation::QuickGelu: return x * cpu::sigmoid(static_cast<float>(config.activation_alpha) * x);
  }
  return x;
}

SHARD_CLONES void add_row(float* a, const float* b, Index n, bool bf16) {
  for (Index i = 0; i < n; ++i) a[i] += b[i];
  if (bf16)
    for (Index i = 0; i < n; ++i) a[i] = round_bf16(a[i]);
}

}  // namespace

void parallel_ranges(const Context& on, Index count, Index grain, const std::function<void(Index lo, Index hi)>& body) {
  const auto pieces = std::clamp<Index>(count / std::max<Index>(grain, 1), 1, static_cast<Index>(on.threads));
  if (pieces == 1) return body(0, count);
  cpu::run_on_workers(static_cast<std::size_t>(pieces), on.threads, [&](std::size_t i) {
    const auto at = static_cast<Index>(i);
    body(count * at / pieces, count * (at + 1) / pieces);
  }, on.stop);
}

void round_values(const Context& on, std::span<float> values) {
  if (rounds_to_bf16(on.compute)) round_all(values.data(), static_cast<Index>(values.size()));
}

Tensor normalize(const Context& on, const Tensor& x, shard::Normalization kind, double epsilon, bool zero_centered, const Weight& weight,
                 const Weight& bias) {
  const NormWeights weights(weight, bias, x.columns(), zero_centered);
  Tensor out(x.rows(), x.columns());
  parallel_ranges(on, x.rows(), 16, [&](Index lo, Index hi) {
    for (Index r = lo; r < hi; ++r) norm_row(on, x.row(r), out.row(r), x.columns(), kind, epsilon, zero_centered, weights);
  });
  return out;
}

void normalize_pieces(const Context& on, float* first, Index rows, Index row_stride, Index pieces, Index width, shard::Normalization kind,
                      double epsilon, bool zero_centered, const Weight& weight, const Weight& bias) {
  const NormWeights weights(weight, bias, width, zero_centered);
  parallel_ranges(on, rows, 16, [&](Index lo, Index hi) {
    for (Index r = lo; r < hi; ++r)
      for (Index p = 0; p < pieces; ++p) {
        auto* at = first + r * row_stride + p * width;
        norm_row(on, at, at, width, kind, epsilon, zero_centered, weights);
      }
  });
}

void activate(const Context& on, const shard::TransformerConfig& config, const Tensor* gate, Tensor& up) {
  const bool bf16 = rounds_to_bf16(on.compute);
  const auto offset = static_cast<float>(config.glu_linear_offset);
  const auto clamp = config.activation_clamp ? static_cast<float>(*config.activation_clamp) : 0.0f;
  parallel_ranges(on, up.rows(), 4, [&](Index lo, Index hi) {
    for (Index r = lo; r < hi; ++r) {
      auto* u = up.row(r);
      if (gate && config.activation == shard::Activation::Silu && !config.activation_clamp) {
        silu_gate(gate->row(r), u, up.columns(), offset, bf16);
        continue;
      }
      for (Index i = 0; i < up.columns(); ++i) {
        float a = gate ? gate->row(r)[i] : u[i];
        if (config.activation_clamp) {
          a = std::min(a, clamp);
          u[i] = std::clamp(u[i], -clamp, clamp);
        }
        float value = activation(config, a);
        if (bf16) value = round_bf16(value);
        if (gate) value *= u[i] + offset;
        u[i] = bf16 ? round_bf16(value) : value;
      }
    }
  });
}

void add(const Context& on, Tensor& a, const Tensor& b) {
  parallel_ranges(on, a.rows(), 64, [&](Index lo, Index hi) {
    for (Index r = lo; r < hi; ++r) add_row(a.row(r), b.row(r), a.columns(), rounds_to_bf16(on.compute));
  });
}

void scale(const Context& on, Tensor& a, double factor) {
  if (factor == 1) return;
  for (auto& value : a.values()) value *= static_cast<float>(factor);
  round_values(on, a.values());
}

void softcap(const Context& on, Tensor& a, double cap) {
  if (cap == 0) return;
  const auto c = static_cast<float>(cap);
  parallel_ranges(on, a.rows(), 4, [&](Index lo, Index hi) {
    for (Index r = lo; r < hi; ++r)
      for (Index i = 0; i < a.columns(); ++i) a.row(r)[i] = c * std::tanh(a.row(r)[i] / c);
  });
  round_values(on, a.values());
}

}  // namespace lm::cpu
