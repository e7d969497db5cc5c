// The operations of a decoder on one device's memory, as the layers call them. lm/cpu says what each of them means.
#pragma once

#include "libshard/transformer_config.h"
#include "lm/comm.h"
#include "lm/tensor.h"

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace lm {

/// What a device makes for itself once and reads again and again: packed activations, tables of angles, chosen experts.
struct Packed {
  Index tokens = 0, features = 0;
  std::shared_ptr<const void> form;
};
struct Rope {
  std::shared_ptr<const void> form;  ///< none: nothing turns
};
struct Routing {
  std::shared_ptr<const void> form;
};

struct Norm {
  shard::Normalization kind = shard::Normalization::RMSNorm;
  double epsilon = 1e-5;
  bool zero_centered = false;
};

/// Causal attention inside each of `batch` sequences of `length` rows.
struct AttentionShape {
  Index batch, length;
  Index heads, ratio;            ///< query heads here; query heads for each key head
  Index first_head = 0;          ///< number of the first query head relative to the first key head's group
  Index key_size, value_size;
  double scale;
  double softcap = 0;
  Index window = 0;              ///< keys that a query sees, itself included; 0: all before it
  bool off_by_one = false;
};

/// A linear's weight [outputs, inputs] and its bias [outputs], or none. A weight in e4m3 has scales, one for each block that it touches: the product
/// then takes its input so as well.
struct Linear {
  Weight weight, bias;
  Weight scales = {};
};

/// One of several linears of the same input.
struct LinearInto {
  const Linear& by;
  Tensor& out;
};

/// A rank's part of a feed-forward: rows of gate (none where it is not gated) and up, columns of down.
struct FeedForward {
  Linear gate, up, down;
};

/// What a tensor's numbers look like. The digest is that of lm/digest.h.
struct TensorStats {
  double rms = 0, max_abs = 0;
  std::uint64_t nonfinite = 0, digest = 0;
};

/// Cross entropy over a vocabulary that is cut among ranks and arrives in blocks. As Megatron's unfused path: no mask, no
/// reduction; every column below the limit takes part; a label outside gives log S.
class LossSum {
 public:
  virtual ~LossSum() = default;
  /// Columns [first, first + block.columns()) of every row's logits, each column once over all ranks.
  virtual void add(const Tensor& block, Index first) = 0;
  /// The loss of every row; all ranks of `tensor` get the same.
  virtual std::vector<float> finish(Comm& tensor) = 0;
  struct Seen {
    double max_abs = 0;                        ///< of finite logits
    std::uint64_t nonfinite = 0;
  };
  /// Of this rank's logits below the limit.
  virtual Seen seen() = 0;
};

/// The end of every LossSum: what a rank saw of each row – the maximum, the sum of e^(x − maximum) and the label's logit (0 where another
/// rank has it) – joined over ranks.
std::vector<float> join_losses(const std::vector<Index>& labels, Index limit, std::vector<float> top, std::vector<double> sum, std::vector<float> target, Comm& tensor);

/// One rank's device. Every result is rounded once, to what compute() stores.
class Ops {
 public:
  virtual ~Ops() = default;
  virtual Compute compute() const = 0;

  // Memory.
  virtual Tensor make(Index rows, Index columns) = 0;
  virtual Tensor clone(const Tensor& x) = 0;
  virtual Tensor to_device(const Tensor& host) = 0;
  virtual Tensor to_host(const Tensor& x) = 0;
  virtual Ids ids(std::vector<Index> values) = 0;

  /// Until all that was asked for is done; throws what failed in it.
  virtual void finish() {}

  // Products.
  /// `x` [tokens, features] laid out for the linears that take it; it must outlive what is returned.
  virtual Packed pack(const Tensor& x) = 0;
  /// out[t, n] = Σ_k x[t, k]·w[n, k] + bias[n].
  virtual void linear(const Packed& x, const Linear& by, Tensor& out) = 0;
  /// Several of one input, which a device may compute together.
  virtual void linears(const Packed& x, std::span<const LinearInto> all) {
    for (const auto& one : all) linear(x, one.by, one.out);
  }
  /// linear() with both sides in f32 and an f32 result, whatever compute() says.
  virtual Tensor linear_f32(const Tensor& x, const Linear& by) = 0;

  // Rows and lanes.
  /// norm(x) over rows, statistics in f32; weight and bias [columns] may be none.
  virtual Tensor normalize(const Tensor& x, const Norm& norm, const Linear& by) = 0;
  /// norm(x) into columns [first, first + x.columns()) of `out`.
  virtual void normalize_into(const Tensor& x, const Norm& norm, const Linear& by, Tensor& out, Index first) {
    copy_pieces(normalize(x, norm, by), 0, 0, out, first, 0, 1, x.columns());
  }
  /// x += branch; norm(x).
  virtual Tensor add_normalize(Tensor& x, const Tensor& branch, const Norm& norm, const Linear& by) {
    add(x, branch);
    return normalize(x, norm, by);
  }
  /// norm(x) in place over `pieces` runs of `width` lanes from every row's first.
  virtual void normalize_pieces(Tensor& x, Index pieces, Index width, const Norm& norm, const Linear& by) = 0;
  /// The angles of positions 0 … length − 1.
  virtual Rope rope(const shard::RopeConfig& config, Index length) = 0;
  /// Turns the first lanes of `heads` heads in place, the first from lane `first`, then every `stride`. Row r has position r mod length.
  virtual void apply_rope(const Rope& rope, Tensor& x, Index first, Index heads, Index stride, Index length) = 0;
  /// to[r, to_first + p·to_stride + i] = from[r, from_first + p·from_stride + i] for p < pieces and i < width.
  virtual void copy_pieces(const Tensor& from, Index from_first, Index from_stride, Tensor& to, Index to_first, Index to_stride, Index pieces, Index width) = 0;
  virtual void add(Tensor& a, const Tensor& b) = 0;
  virtual void scale(Tensor& a, double factor) = 0;
  /// c·tanh(x/c).
  virtual void softcap(Tensor& a, double cap) = 0;
  /// x[r] ← x[r]·sigmoid(gate[r, 0]).
  virtual void gate_rows(Tensor& x, const Tensor& gate) = 0;
  /// In place on `up`: act(gate)·(up + offset), with clamps; `gate` none: act(up).
  virtual void activate(const shard::TransformerConfig& config, const Tensor* gate, Tensor& up) = 0;
  /// Sums that came from ranks in f32 are rounded as a result is.
  virtual void round(Tensor& x) = 0;

  /// q [rows, heads·key_size], k [rows, key heads·key_size], v [rows, key heads·value_size]; sinks [heads] or none.
  /// Returns [rows, heads·value_size].
  virtual Tensor attention(const AttentionShape& shape, const Tensor& q, const Tensor& k, const Tensor& v, const Weight& sinks) = 0;

  // Experts.
  /// `logits` [tokens, experts]; `bias` [experts] only takes part in choosing.
  virtual Routing route(const shard::RouterConfig& config, const Tensor& logits, const Weight& bias) = 0;
  /// Every token's experts, weighed and added up in ascending order. Calls `weights` once for each expert, in order. A rank's partial sum.
  virtual Tensor experts(const shard::TransformerConfig& config, const Tensor& x, const Routing& routing,
                         const std::function<FeedForward(Index expert)>& weights) = 0;

  // What is said about results; the numbers may be asked for when the pass is over.
  virtual std::unique_ptr<LossSum> cross_entropy(const Ids& labels, Index limit) = 0;
  virtual std::function<TensorStats()> stats(const Tensor& x) = 0;

  /// `step` of these inputs, which lie on the host. A device may record the work under `key` and replay it with other inputs and other numbers
  /// in the same weights.
  using Step = std::function<Tensor(const Tensor& hidden, const Ids& ids, const Ids& positions)>;
  virtual Tensor recorded(const std::string& key, const Tensor& hidden, const std::vector<Index>& ids, const std::vector<Index>& positions, const Step& step) {
    (void)key;
    return step(to_device(hidden), this->ids(ids), this->ids(positions));
  }
};

}  // namespace lm
