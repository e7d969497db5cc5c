// Small loops stand here; the others have files of their own.
#include "lm/cpu/host_ops.h"

#include "libshard/stop.h"
#include "lm/cpu/cross_entropy.h"

#include <algorithm>
#include <cmath>

namespace lm::cpu {

lm::Packed HostOps::pack(const Tensor& x) { return {x.rows(), x.columns(), std::make_shared<const Packed>(on_, x)}; }

void HostOps::linear(const lm::Packed& x, const Linear& by, Tensor& out) { cpu::linear(on_, *static_cast<const Packed*>(x.form.get()), by, out); }

Tensor HostOps::linear_f32(const Tensor& x, const Linear& by) {
  Tensor out(x.rows(), by.weight.rows);
  if (on_.compute == Compute::F32) {
    cpu::linear(on_, Packed(on_, x), by.weight, by.bias, out);
    return out;
  }
  for (Index r = 0; r < x.rows(); ++r) {
    shard::refuse_stopped(on_.stop);
    for (Index n = 0; n < out.columns(); ++n) {
      double sum = by.bias ? static_cast<double>(by.bias.at(0, n)) : 0.0;
      for (Index c = 0; c < x.columns(); ++c) sum += static_cast<double>(x.row(r)[c]) * static_cast<double>(by.weight.at(n, c));
      out.row(r)[n] = static_cast<float>(sum);
    }
  }
  return out;
}

Tensor HostOps::normalize(const Tensor& x, const Norm& norm, const Linear& by) {
  return cpu::normalize(on_, x, norm.kind, norm.epsilon, norm.zero_centered, by.weight, by.bias);
}

void HostOps::normalize_pieces(Tensor& x, Index pieces, Index width, const Norm& norm, const Linear& by) {
  cpu::normalize_pieces(on_, x.row(0), x.rows(), x.columns(), pieces, width, norm.kind, norm.epsilon, norm.zero_centered, by.weight, by.bias);
}

Rope HostOps::rope(const shard::RopeConfig& config, Index length) {
  auto table = std::make_shared<const RopeTable>(rope_table(config, length));
  return table->half ? Rope{std::move(table)} : Rope{};
}

void HostOps::apply_rope(const Rope& rope, Tensor& x, Index first, Index heads, Index stride, Index length) {
  if (rope.form) cpu::apply_rope(on_, *static_cast<const RopeTable*>(rope.form.get()), x.row(0) + first, x.rows(), x.columns(), heads, stride, length);
}

void HostOps::copy_pieces(const Tensor& from, Index from_first, Index from_stride, Tensor& to, Index to_first, Index to_stride, Index pieces, Index width) {
  for (Index r = 0; r < from.rows(); ++r)
    for (Index p = 0; p < pieces; ++p) {
      const auto* at = from.row(r) + from_first + p * from_stride;
      std::copy(at, at + width, to.row(r) + to_first + p * to_stride);
    }
}

void HostOps::gate_rows(Tensor& x, const Tensor& gate) {
  for (Index r = 0; r < x.rows(); ++r)
    for (Index c = 0; c < x.columns(); ++c) x.row(r)[c] *= 1.0f / (1.0f + std::exp(-gate.row(r)[0]));
  round(x);
}

lm::Routing HostOps::route(const shard::RouterConfig& config, const Tensor& logits, const Weight& bias) {
  return {std::make_shared<const Routing>(cpu::route(on_, config, logits, bias))};
}

Tensor HostOps::experts(const shard::TransformerConfig& config, const Tensor& x, const lm::Routing& routing,
                        const std::function<FeedForward(Index expert)>& weights) {
  return cpu::experts(on_, config, x, *static_cast<const Routing*>(routing.form.get()), weights);
}

std::unique_ptr<LossSum> HostOps::cross_entropy(const Ids& labels, Index limit) { return std::make_unique<CrossEntropy>(on_, labels.host, limit); }

std::function<TensorStats()> HostOps::stats(const Tensor& x) {
  return [found = cpu::stats(on_, x)] { return found; };
}

}  // namespace lm::cpu
