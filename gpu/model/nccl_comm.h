// Ranks on devices of their own, of one process or of many: all that they tell each other travels by NCCL.
#pragma once

#include "gpu/libs/nccl.h"
#include "gpu/model/device_ops.h"
#include "lm/comm.h"

namespace gpu {

/// Ranks that are threads meet by their group.
class Threads : public Together {
 public:
  Threads(lm::Group& group, int rank) : comm_(group, rank) {}
  void all() override {
    float none = 0;
    comm_.all_reduce_sum({&none, 1});
  }
  void pair(int peer) override {
    lm::Tensor none;
    comm_.send(peer, {});
    comm_.receive(peer, none);
  }

 private:
  lm::LocalComm comm_;
};

class NcclComm : public lm::Comm {
 public:
  /// Keeps references to both.
  NcclComm(DeviceOps& ops, Communicator& peers) : ops_(ops), peers_(peers) {}
  int rank() const override { return peers_.rank(); }
  int size() const override { return peers_.size(); }
  void all_reduce_sum(std::span<float> host) override;
  void all_reduce_max(std::span<float> host) override;
  void all_reduce_sum(lm::Tensor& x) override;
  void send(int to, lm::Tensor x) override;
  void receive(int from, lm::Tensor& into) override;

 private:
  /// Every rank's numbers, by rank.
  std::vector<float> all_gather(std::span<const float> host);
  /// In rank order.
  template <typename Join>
  void reduce(std::span<float> host, Join join);
  DeviceOps& ops_;
  Communicator& peers_;
};

}  // namespace gpu
