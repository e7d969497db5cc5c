// The list of lm/ops.h on one device: kernels of gpu/ops, products by cuBLASLt where it is there, work that repeats recorded in graphs.
#pragma once

#include "gpu/libs/cublaslt.h"
#include "gpu/libs/cudnn.h"
#include "gpu/model/arena.h"
#include "gpu/model/scaled_products.h"
#include "gpu/model/step_inputs.h"
#include "gpu/runtime.h"
#include "gpu/view.h"
#include "lm/attention_backend.h"
#include "lm/ops.h"

#include <map>
#include <optional>
#include <string>
#include <vector>

namespace gpu {

/// What ops see of a tensor and of a weight.
View view_of(const lm::Tensor& x);
View view_of(const lm::Weight& weight);
inline const std::int64_t* on_device(const lm::Ids& ids) { return reinterpret_cast<const std::int64_t*>(ids.device.get()); }

/// What computes attention of that shape: `asked`, or for Auto the first that can of flash, local and unfused. Throws Device where `asked` cannot.
lm::AttentionBackend choose_attention(lm::AttentionBackend asked, const lm::AttentionShape& shape);

struct DeviceInput;

struct OpsOptions {
  int device = 0;
  lm::Compute compute = lm::Compute::F32;
  lm::AttentionBackend attention = lm::AttentionBackend::Auto;
  bool tf32 = false;                                 ///< f32 products may lose mantissa
  bool graphs = true;                                ///< recorded() records
  std::string cublaslt = {}, cudnn = {};             ///< paths in place of the usual names
};

/// Activations are stored as F32 in f32 compute and as BF16 in bf16. One stream; calls return before the device is done.
class DeviceOps : public lm::Ops {
 public:
  using Index = lm::Index;
  using Tensor = lm::Tensor;
  using Linear = lm::Linear;
  explicit DeviceOps(OpsOptions options);
  /// Waits until nothing reads or writes what ends with this.
  ~DeviceOps() override;

  lm::Compute compute() const override { return options_.compute; }
  int device() const { return options_.device; }
  StreamView stream() const { return stream_; }
  /// Takes the device for the calling thread.
  void enter() const { use_device(options_.device); }
  /// Recorded work is forgotten: weights are elsewhere, or the model computes otherwise.
  void forget_recorded() { recorded_.clear(); }
  /// Bytes that activations took.
  std::uint64_t held() const;
  /// What products and attention run on, and why: for people.
  std::vector<std::string> notes() const;

  Tensor make(Index rows, Index columns) override;
  Tensor clone(const Tensor& x) override;
  Tensor to_device(const Tensor& host) override;
  Tensor to_host(const Tensor& x) override;
  lm::Ids ids(std::vector<Index> values) override;
  void finish() override { gpu::wait(stream_); }
  lm::Packed pack(const Tensor& x) override;
  void linear(const lm::Packed& x, const Linear& by, Tensor& out) override;
  void linears(const lm::Packed& x, std::span<const lm::LinearInto> all) override;
  Tensor linear_f32(const Tensor& x, const Linear& by) override;
  Tensor normalize(const Tensor& x, const lm::Norm& norm, const Linear& by) override;
  void normalize_into(const Tensor& x, const lm::Norm& norm, const Linear& by, Tensor& out, Index first) override;
  Tensor add_normalize(Tensor& x, const Tensor& branch, const lm::Norm& norm, const Linear& by) override;
  void normalize_pieces(Tensor& x, Index pieces, Index width, const lm::Norm& norm, const Linear& by) override;
  lm::Rope rope(const shard::RopeConfig& config, Index length) override;
  void apply_rope(const lm::Rope& rope, Tensor& x, Index first, Index heads, Index stride, Index length) override;
  void copy_pieces(const Tensor& from, Index from_first, Index from_stride, Tensor& to, Index to_first, Index to_stride, Index pieces, Index width) override;
  void add(Tensor& a, const Tensor& b) override;
  void scale(Tensor& a, double factor) override;
  void softcap(Tensor& a, double cap) override;
  void gate_rows(Tensor& x, const Tensor& gate) override;
  void activate(const shard::TransformerConfig& config, const Tensor* gate, Tensor& up) override;
  void round(Tensor&) override {}  // sums come rounded to the tensor's type
  Tensor attention(const lm::AttentionShape& shape, const Tensor& q, const Tensor& k, const Tensor& v, const lm::Weight& sinks) override;
  lm::Routing route(const shard::RouterConfig& config, const Tensor& logits, const lm::Weight& bias) override;
  Tensor experts(const shard::TransformerConfig& config, const Tensor& x, const lm::Routing& routing,
                 const std::function<lm::FeedForward(Index expert)>& weights) override;
  std::unique_ptr<lm::LossSum> cross_entropy(const lm::Ids& labels, Index limit) override;
  std::function<lm::TensorStats()> stats(const Tensor& x) override;
  Tensor recorded(const std::string& key, const Tensor& hidden, const std::vector<Index>& ids, const std::vector<Index>& positions, const Step& step) override;

  Tensor make(shard::DType type, Index rows, Index columns);
  /// Scratch that lives as long as what is returned.
  std::shared_ptr<std::byte> scratch(std::size_t bytes) { return arena_.take(bytes); }
  /// Pinned memory for one exchange of numbers at a time. It outlives an exchange that an exception ends, whose work may still be given to the stream.
  std::byte* pinned(std::size_t bytes);
  /// x ← x rounded to its type, from an f32 tensor.
  void store(Tensor& x, const Tensor& f32);

 private:
  struct Recording {
    Arena arena;
    StepInputs inputs;
    std::shared_ptr<Tensor> out;                     ///< lent as it is; busy while somebody holds it
    Graph graph;
  };
  struct Recorded {
    int runs = 0;
    std::vector<Recording> turns;
  };
  struct Angles {
    shard::RopeConfig config;
    Index length;
    lm::Rope rope;
  };
  shard::DType type() const { return lm::rounds_to_bf16(options_.compute) ? shard::DType::BF16 : shard::DType::F32; }
  void fused(const lm::AttentionShape& shape, const View& q, const View& k, const View& v, bool sinks, const View& out);
  void unfused(lm::AttentionShape shape, const View& q, const View& k, const View& v, const View& sinks, const View& out);
  void product(const View& x, const Linear& by, const View& out);
  /// As products in fp8 see it whose weight begins `first` columns behind a block's start; lasts as long as `input`.
  const ScaledRows& scaled_input(const DeviceInput& input, Index first);
  StepInputs places(const Tensor& hidden, const std::vector<Index>& ids, const std::vector<Index>& positions);
  Recording record(const Tensor& hidden, const std::vector<Index>& ids, const std::vector<Index>& positions, const Step& step);
  /// `view`, or a copy of it as `type` in `keep`.
  View as(shard::DType type, const View& view, Tensor& keep);
  /// Addresses in device memory; the same list gets the same memory.
  const std::byte* const* pointers(const std::vector<const std::byte*>& list);

  OpsOptions options_;
  DeviceInfo info_;
  Stream stream_;
  Arena arena_;
  std::optional<Matmul> matmul_;
  std::optional<ScaledProducts> scaled_;             ///< in Fp8
  std::optional<FusedAttention> fused_;              ///< loaded when first asked for
  std::string products_;                             ///< by what, and why
  std::vector<Angles> ropes_;                        ///< recorded work reads them
  std::map<std::vector<const std::byte*>, DeviceBuffer> pointers_;
  StepUploads uploads_;
  PinnedBuffer pinned_;
  std::map<std::string, Recorded> recorded_;
};

}  // namespace gpu
