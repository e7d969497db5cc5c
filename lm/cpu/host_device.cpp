// Every rank computes on the host; weights pass by in their files' memory.
#include "lm/device.h"

#include "libshard/error.h"
#include "lm/cpu/host_ops.h"

#include <deque>
#include <optional>

namespace lm {
namespace {

class HostDevice : public Device {
 public:
  std::string name() const override { return "cpu"; }
  void prepare(const Ranks& ranks, const shard::TransformerConfig& config, const std::vector<StagePlan>& stages) override {
    shard::require(!ranks.processes, shard::Code::Usage, [] { return "--device cpu: ranks are threads of one process there; several processes need CUDA devices"; });
    ranks_ = ranks;
    config_ = config;
    stages_ = stages;
    ops_.clear();
    for (int i = 0; i < ranks.tensor * ranks.pipeline; ++i) ops_.emplace_back(cpu::Context{ranks.compute, ranks.threads, ranks.stop});
    weights_.clear();
    weights_.resize(ops_.size());
  }
  std::vector<WeightUse> takes(int stage) const override {
    auto uses = stages_[static_cast<std::size_t>(stage)].uses;
    for (auto& use : uses) use.times *= ranks_.tensor;
    return uses;
  }
  Ops& ops(int stage, int tensor_rank) override { return ops_[static_cast<std::size_t>(stage * ranks_.tensor + tensor_rank)]; }
  std::unique_ptr<Comm> comm(Group& group, Axis axis, int stage, int tensor_rank) override {
    return std::make_unique<LocalComm>(group, axis == Axis::Tensor ? tensor_rank : stage);
  }
  Weights& weights(WeightStream& stream, int stage, int tensor_rank) override {
    return weights_[static_cast<std::size_t>(stage * ranks_.tensor + tensor_rank)].emplace(config_, stream, TensorRank{tensor_rank, ranks_.tensor});
  }

 private:
  Ranks ranks_;
  shard::TransformerConfig config_;
  std::vector<StagePlan> stages_;
  std::deque<cpu::HostOps> ops_;
  std::deque<std::optional<RankStream>> weights_;
};

}  // namespace

std::unique_ptr<Device> host_device() { return std::make_unique<HostDevice>(); }

}  // namespace lm
