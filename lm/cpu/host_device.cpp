// Every rank computes on the host; weights pass by in their files' memory.
#include "lm/device.h"

#include "lm/cpu/host_ops.h"

#include <deque>

namespace lm {
namespace {

class HostDevice : public Device {
 public:
  std::string name() const override { return "cpu"; }
  void prepare(const Ranks& ranks, const shard::TransformerConfig&, const std::vector<StagePlan>&) override {
    ranks_ = ranks;
    ops_.clear();
    for (int i = 0; i < ranks.tensor * ranks.pipeline; ++i) ops_.emplace_back(cpu::Context{ranks.compute, ranks.threads});
  }
  bool resident() const override { return false; }
  Ops& ops(int stage, int tensor_rank) override { return ops_[static_cast<std::size_t>(stage * ranks_.tensor + tensor_rank)]; }
  std::unique_ptr<Comm> comm(Group& group, int member, int, int) override { return std::make_unique<LocalComm>(group, member); }
  Weights& weights(WeightStream& stream, int, int) override { return stream; }

 private:
  Ranks ranks_;
  std::deque<cpu::HostOps> ops_;
};

}  // namespace

std::unique_ptr<Device> host_device() { return std::make_unique<HostDevice>(); }

}  // namespace lm
