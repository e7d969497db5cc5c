// The list of lm/ops.h on the host's memory and threads.
#pragma once

#include "lm/cpu/ops.h"

namespace lm::cpu {

class HostOps : public Ops {
 public:
  explicit HostOps(Context on) : on_(on) {}
  Compute compute() const override { return on_.compute; }
  Tensor make(Index rows, Index columns) override { return Tensor(rows, columns); }
  Tensor clone(const Tensor& x) override { return x.clone(); }
  Tensor to_device(const Tensor& host) override { return host.clone(); }
  Tensor to_host(const Tensor& x) override { return x.clone(); }
  Ids ids(std::vector<Index> values) override { return {std::move(values), {}}; }
  lm::Packed pack(const Tensor& x) override;
  void linear(const lm::Packed& x, const Linear& by, Tensor& out) override;
  Tensor linear_f32(const Tensor& x, const Linear& by) override;
  Tensor normalize(const Tensor& x, const Norm& norm, const Linear& by) override;
  void normalize_pieces(Tensor& x, Index pieces, Index width, const Norm& norm, const Linear& by) override;
  Rope rope(const shard::RopeConfig& config, Index length) override;
  void apply_rope(const Rope& rope, Tensor& x, Index first, Index heads, Index stride, Index length) override;
  void copy_pieces(const Tensor& from, Index from_first, Index from_stride, Tensor& to, Index to_first, Index to_stride, Index pieces, Index width) override;
  void add(Tensor& a, const Tensor& b) override { cpu::add(on_, a, b); }
  void scale(Tensor& a, double factor) override { cpu::scale(on_, a, factor); }
  void softcap(Tensor& a, double cap) override { cpu::softcap(on_, a, cap); }
  void gate_rows(Tensor& x, const Tensor& gate) override;
  void activate(const shard::TransformerConfig& config, const Tensor* gate, Tensor& up) override { cpu::activate(on_, config, gate, up); }
  void round(Tensor& x) override { round_values(on_, x.values()); }
  Tensor attention(const AttentionShape& shape, const Tensor& q, const Tensor& k, const Tensor& v, const Weight& sinks) override {
    return cpu::attention(on_, shape, q, k, v, sinks);
  }
  lm::Routing route(const shard::RouterConfig& config, const Tensor& logits, const Weight& bias) override;
  Tensor experts(const shard::TransformerConfig& config, const Tensor& x, const lm::Routing& routing,
                 const std::function<FeedForward(Index expert)>& weights) override;
  std::unique_ptr<LossSum> cross_entropy(const Ids& labels, Index limit) override;
  std::function<TensorStats()> stats(const Tensor& x) override;

 private:
  Context on_;
};

}  // namespace lm::cpu
