// What is said about results: losses and statistics, whose few numbers come to the host when they are asked for.
#include "gpu/model/device_ops.h"
#include "gpu/ops/cross_entropy.h"
#include "gpu/ops/look.h"

#include <bit>
#include <cmath>

namespace gpu {
namespace {

class DeviceLoss : public lm::LossSum {
 public:
  DeviceLoss(DeviceOps& ops, const lm::Ids& labels, lm::Index limit) : ops_(ops), labels_(labels), limit_(limit), rows_(labels.host.size()) {
    const auto floats = (rows_ * sizeof(float) + 255) / 256 * 256;
    memory_ = ops_.scratch(4 * floats + 256);
    auto* at = memory_.get();
    peak_ = reinterpret_cast<LogitsPeak*>(at);
    state_ = {reinterpret_cast<float*>(at + 256), reinterpret_cast<double*>(at + 256 + floats), reinterpret_cast<float*>(at + 256 + 3 * floats), static_cast<std::int64_t>(rows_)};
    set_bytes(at, 0, 256, ops_.stream());
    cross_entropy_start(ops_.stream(), state_);
  }
  void add(const lm::Tensor& block, lm::Index first) override {
    cross_entropy_add(ops_.stream(), state_, view_of(block), first, limit_, on_device(labels_), peak_);
  }
  std::vector<float> finish(lm::Comm& tensor) override {
    std::vector<float> top(rows_), target(rows_);
    std::vector<double> sum(rows_);
    to_host(top.data(), reinterpret_cast<std::byte*>(state_.top), rows_ * sizeof(float), ops_.stream());
    to_host(sum.data(), reinterpret_cast<std::byte*>(state_.sum), rows_ * sizeof(double), ops_.stream());
    to_host(target.data(), reinterpret_cast<std::byte*>(state_.target), rows_ * sizeof(float), ops_.stream());
    gpu::wait(ops_.stream());
    return lm::join_losses(labels_.host, limit_, std::move(top), std::move(sum), std::move(target), tensor);
  }
  Seen seen() override {
    LogitsPeak peak;
    to_host(&peak, reinterpret_cast<std::byte*>(peak_), sizeof peak, ops_.stream());
    gpu::wait(ops_.stream());
    return {static_cast<double>(std::bit_cast<float>(peak.peak_bits)), peak.nonfinite};
  }

 private:
  DeviceOps& ops_;
  lm::Ids labels_;
  lm::Index limit_;
  std::size_t rows_;
  std::shared_ptr<std::byte> memory_;
  CrossEntropyState state_;
  LogitsPeak* peak_ = nullptr;
};

}  // namespace

std::unique_ptr<lm::LossSum> DeviceOps::cross_entropy(const lm::Ids& labels, Index limit) { return std::make_unique<DeviceLoss>(*this, labels, limit); }

std::function<lm::TensorStats()> DeviceOps::stats(const Tensor& x) {
  const auto memory = scratch(256 + look_scratch_bytes());
  auto* found = reinterpret_cast<ActivationLook*>(memory.get());
  look_at_activation(stream_, view_of(x), memory.get() + 256, found);
  const auto count = static_cast<double>(x.rows() * x.columns());
  return [this, memory, found, count]() -> lm::TensorStats {
    ActivationLook look;
    gpu::to_host(&look, reinterpret_cast<const std::byte*>(found), sizeof look, stream_);
    gpu::wait(stream_);
    return {std::sqrt(look.squares / std::max(1.0, count)), static_cast<double>(look.max_abs), look.nonfinite, look.digest};
  };
}

}  // namespace gpu
