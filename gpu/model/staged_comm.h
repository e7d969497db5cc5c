// Ranks of one process that talk through the host's memory: where NCCL is absent, or ranks share a device. Sums are those of lm::LocalComm.
#pragma once

#include "gpu/model/device_ops.h"
#include "lm/comm.h"

namespace gpu {

class StagedComm : public lm::Comm {
 public:
  StagedComm(lm::Group& group, int rank, DeviceOps& ops) : local_(group, rank), ops_(ops) {}
  int rank() const override { return local_.rank(); }
  int size() const override { return local_.size(); }
  void all_reduce_sum(std::span<float> host) override { local_.all_reduce_sum(host); }
  void all_reduce_max(std::span<float> host) override { local_.all_reduce_max(host); }
  void all_reduce_sum(lm::Tensor& x) override {
    auto host = ops_.to_host(x);
    local_.all_reduce_sum(host);
    x = ops_.to_device(host);
  }
  void send(int to, lm::Tensor x) override { local_.send(to, ops_.to_host(x)); }
  void receive(int from, lm::Tensor& into) override {
    lm::Tensor host;
    local_.receive(from, host);
    into = ops_.to_device(host);
  }

 private:
  lm::LocalComm local_;
  DeviceOps& ops_;
};

}  // namespace gpu
