// The formulas of elementwise ops.
#include "gpu/ops/elementwise.h"

#include "gpu/ops/map.h"

namespace gpu {
namespace {

using Index = std::int64_t;

struct Add {
  static constexpr bool kPlaceless = true;
  GPU_CODE float operator()(Index, Index, const float* x) const { return x[0] + x[1]; }
};
struct Scale {
  static constexpr bool kPlaceless = true;
  float factor;
  GPU_CODE float operator()(Index, Index, const float* x) const { return x[0] * factor; }
};
struct Softcap {
  static constexpr bool kPlaceless = true;
  float cap;
  GPU_CODE float operator()(Index, Index, const float* x) const { return cap * tanhf(x[0] / cap); }
};
struct Same {
  static constexpr bool kPlaceless = true;
  GPU_CODE float operator()(Index, Index, const float* x) const { return x[0]; }
};
struct Constant {
  static constexpr bool kPlaceless = true;
  float value;
  GPU_CODE float operator()(Index, Index, const float*) const { return value; }
};
struct ScaleRows {
  static constexpr bool kPlaceless = false;
  const float* w;
  GPU_CODE float operator()(Index r, Index, const float* x) const { return x[0] * w[r]; }
};
struct AddWeightedBias {
  static constexpr bool kPlaceless = false;
  Numbers bias;
  const float* w;
  GPU_CODE float operator()(Index r, Index c, const float* x) const { return x[0] + bias[c] * w[r]; }
};
struct GateRows {
  static constexpr bool kPlaceless = false;
  Numbers gate;
  Index stride;
  GPU_CODE float operator()(Index r, Index, const float* x) const { return x[0] * sigmoid(gate[r * stride]); }
};

GPU_CODE float activation(shard::Activation kind, float alpha, float x) {
  using enum shard::Activation;
  switch (kind) {
    case Silu: return x * sigmoid(x);
    case GeluErf: return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    case GeluTanh: return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * x * (1.0f + 0.044715f * x * x)));
    case Relu: return x > 0 ? x : 0.0f;
    case SquaredRelu: return x > 0 ? x * x : 0.0f;
    case QuickGelu: return x * sigmoid(alpha * x);
  }
  return x;
}

/// Inputs: up, then gate where there is one. T: what the activation's value is rounded to before the product.
template <typename T, bool kGated>
struct Activate {
  static constexpr bool kPlaceless = true;
  shard::Activation kind;
  float alpha, offset, clamp;
  bool clamped;
  GPU_CODE float operator()(Index, Index, const float* x) const {
    float u = x[0], a = x[kGated ? 1 : 0];
    if (clamped) {
      a = a > clamp ? clamp : a;
      u = u > clamp ? clamp : u < -clamp ? -clamp : u;
    }
    const float value = rounded<T>(activation(kind, alpha, a));
    return kGated ? value * (u + offset) : value;
  }
};

template <typename Out>
void convert_to(StreamView on, const View& to, const View& from) {
  switch (from.type) {
    case shard::DType::F32: return map<Out, float, 1>(on, to, {from}, Same{});
    case shard::DType::BF16: return map<Out, Bf16, 1>(on, to, {from}, Same{});
    case shard::DType::F16: return map<Out, F16, 1>(on, to, {from}, Same{});
    default: shard::fail(shard::Code::Device, "device: numbers of type {}", shard::name(from.type));
  }
}

template <typename F>
void in_place(StreamView on, const View& a, const F& f) {
  with_activation_type(a.type, [&]<typename T>(T) { map<T, T, 1>(on, a, {a}, f); });
}

}  // namespace

void add(StreamView on, const View& a, const View& b) {
  shard::require(a.type == b.type, shard::Code::Device, [] { return "device: a sum of two types"; });
  with_activation_type(a.type, [&]<typename T>(T) { map<T, T, 2>(on, a, {a, b}, Add{}); });
}
void scale(StreamView on, const View& a, double factor) {
  if (factor != 1) in_place(on, a, Scale{static_cast<float>(factor)});
}
void softcap(StreamView on, const View& a, double cap) {
  if (cap != 0) in_place(on, a, Softcap{static_cast<float>(cap)});
}

ActivationConfig activation_config(const shard::TransformerConfig& config) {
  return {config.activation, config.activation_alpha, config.glu_linear_offset, config.activation_clamp.has_value(),
          config.activation_clamp.value_or(0)};
}
void activate(StreamView on, const ActivationConfig& config, const View& gate, const View& up) {
  shard::require(!gate || gate.type == up.type, shard::Code::Device, [] { return "device: a gate of another type"; });
  with_activation_type(up.type, [&]<typename T>(T) {
    const auto alpha = static_cast<float>(config.alpha), offset = static_cast<float>(config.offset), clamp = static_cast<float>(config.clamp);
    if (gate) map<T, T, 2>(on, up, {up, gate}, Activate<T, true>{config.kind, alpha, offset, clamp, config.clamped});
    else map<T, T, 1>(on, up, {up}, Activate<T, false>{config.kind, alpha, offset, clamp, config.clamped});
  });
}

void scale_rows(StreamView on, const View& x, const float* w) { in_place(on, x, ScaleRows{w}); }
void add_weighted_bias(StreamView on, const View& x, const View& bias, const float* w) { in_place(on, x, AddWeightedBias{numbers(bias), w}); }
void gate_rows(StreamView on, const View& x, const View& gate) { in_place(on, x, GateRows{numbers(gate), gate.stride}); }

void convert(StreamView on, const View& to, const View& from) {
  switch (to.type) {
    case shard::DType::F32: return convert_to<float>(on, to, from);
    case shard::DType::BF16: return convert_to<Bf16>(on, to, from);
    case shard::DType::F16: return convert_to<F16>(on, to, from);
    default: shard::fail(shard::Code::Device, "device: numbers of type {}", shard::name(to.type));
  }
}
void fill(StreamView on, const View& to, float value) {
  with_activation_type(to.type, [&]<typename T>(T) { map<T, T, 0>(on, to, {}, Constant{value}); });
}

}  // namespace gpu
