// Ranks of one process on devices of their own: tensors travel by NCCL, the few numbers of losses through the host.
#pragma once

#include "gpu/libs/nccl.h"
#include "gpu/model/device_ops.h"
#include "lm/comm.h"

namespace gpu {

class NcclComm : public lm::Comm {
 public:
  /// Keeps references to all of them.
  NcclComm(lm::Group& group, int rank, DeviceOps& ops, Communicator& peers) : local_(group, rank), ops_(ops), peers_(peers) {}
  int rank() const override { return local_.rank(); }
  int size() const override { return local_.size(); }
  void all_reduce_sum(std::span<float> host) override { local_.all_reduce_sum(host); }
  void all_reduce_max(std::span<float> host) override { local_.all_reduce_max(host); }
  void all_reduce_sum(lm::Tensor& x) override;
  void send(int to, lm::Tensor x) override;
  void receive(int from, lm::Tensor& into) override;

 private:
  lm::LocalComm local_;
  DeviceOps& ops_;
  Communicator& peers_;
};

}  // namespace gpu
