// A running maximum and a running sum for each row of logits.
#pragma once

#include "lm/cpu/ops.h"

#include <vector>

namespace lm::cpu {

class CrossEntropy : public LossSum {
 public:
  /// Over columns [0, limit).
  CrossEntropy(Context on, std::vector<Index> labels, Index limit);
  void add(const Tensor& block, Index first) override;
  std::vector<float> finish(Comm& tensor) override;
  Seen seen() override;

 private:
  Context on_;
  std::vector<Index> labels_;
  Index limit_;
  std::vector<float> top_, target_, peak_;
  std::vector<std::uint64_t> nonfinite_;
  std::vector<double> sum_;
};

}  // namespace lm::cpu
