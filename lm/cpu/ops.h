// What every op means: plain functions over the host's memory. lm/ops.h is the list that devices implement.
#pragma once

#include "libshard/transformer_config.h"
#include "lm/ops.h"

#include <atomic>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

namespace lm::cpu {

/// How ops compute: precision, threads, and the flag that ends them between two of their tasks, with Io. Results do not depend on the number of threads.
struct Context {
  Compute compute = Compute::F32;
  unsigned threads = 1;
  const std::atomic<bool>* stop = nullptr;
};

/// Rounds to bf16, to nearest even, where the context computes in it.
void round_values(const Context& on, std::span<float> values);

/// Activations laid out for products; shared by the linears that take the same input.
class Packed {
 public:
  /// `x` [tokens, features].
  Packed(const Context& on, const Tensor& x);
  Index tokens() const { return tokens_; }
  Index features() const { return features_; }
  /// In Fp8: as linears see `x`, which must be there still, whose weight begins `first` columns behind a block's start. Made when first asked for, by
  /// one thread.
  const Packed& scaled(Index first) const;

 private:
  friend void linear(const Context&, const Packed&, const Weight&, const Weight&, Tensor&, Index);
  struct Scaled;
  Index tokens_, features_;
  std::shared_ptr<std::byte> memory_;
  float* f32_ = nullptr;              ///< [tokens][features], rows apart
  std::uint32_t* pairs_ = nullptr;    ///< or [tokens][⌈features/2⌉] pairs of bf16
  std::shared_ptr<Scaled> scaled_;    ///< in Fp8
};

/// out[t, column + n] = Σ_k x[t, k]·w[n, k] + bias[n]; `w` [n, features], `bias` [n] or none. Rounded once.
void linear(const Context& on, const Packed& x, const Weight& w, const Weight& bias, Tensor& out, Index column = 0);

/// The same by any linear: one in e4m3 takes x.scaled(), whose products with its widened numbers are summed in f32.
void linear(const Context& on, const Packed& x, const Linear& by, Tensor& out);

/// y = norm(x) over rows, statistics in f32. `weight` and `bias` [columns] may be none (L2 norm of Megatron).
Tensor normalize(const Context& on, const Tensor& x, shard::Normalization kind, double epsilon, bool zero_centered, const Weight& weight,
                 const Weight& bias);
/// The same in place over pieces of `width` lanes of every row (q and k norms, latent norms).
void normalize_pieces(const Context& on, float* first, Index rows, Index row_stride, Index pieces, Index width, shard::Normalization kind,
                      double epsilon, bool zero_centered, const Weight& weight, const Weight& bias);

/// cos and sin [positions, dim/2], in f32, times the concentration.
struct RopeTable {
  Index positions = 0, half = 0;
  bool interleaved = false;
  std::vector<float> cos, sin;
};
/// For positions 0 … length−1.
RopeTable rope_table(const shard::RopeConfig& config, Index length);
/// Turns the first 2·half of `lanes` of each head in place. Row r has position r mod length.
void apply_rope(const Context& on, const RopeTable& table, float* first, Index rows, Index row_stride, Index heads, Index head_stride, Index length);

/// q [rows, heads·key_size], k [rows, key heads·key_size], v [rows, key heads·value_size]; sinks [heads] or none.
/// Returns [rows, heads·value_size].
Tensor attention(const Context& on, const AttentionShape& shape, const Tensor& q, const Tensor& k, const Tensor& v, const Weight& sinks);

/// In place on `up`: act(gate)·(up + offset), with clamps; `gate` none: act(up).
void activate(const Context& on, const shard::TransformerConfig& config, const Tensor* gate, Tensor& up);

/// The experts of every token and their weights, both [tokens, topk].
struct Routing {
  Index topk = 0;
  std::vector<Index> expert;
  std::vector<float> weight;
};
/// `logits` [tokens, experts]; `bias` [experts] only takes part in choosing.
Routing route(const Context& on, const shard::RouterConfig& config, const Tensor& logits, const Weight& bias);

/// As Ops::experts.
Tensor experts(const Context& on, const shard::TransformerConfig& config, const Tensor& x, const Routing& routing,
               const std::function<FeedForward(Index expert)>& weights);

TensorStats stats(const Context& on, const Tensor& x);

/// a += b.
void add(const Context& on, Tensor& a, const Tensor& b);
void scale(const Context& on, Tensor& a, double factor);
/// c·tanh(x/c).
void softcap(const Context& on, Tensor& a, double cap);
/// Splits [0, count) among the context's threads in pieces of at least `grain`.
void parallel_ranges(const Context& on, Index count, Index grain, const std::function<void(Index lo, Index hi)>& body);

}  // namespace lm::cpu
