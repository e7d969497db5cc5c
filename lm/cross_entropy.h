// Cross entropy over a vocabulary that is cut among ranks and arrives in blocks. As Megatron's unfused path: no mask, no
// reduction; every column below the limit takes part.
#pragma once

#include "lm/comm.h"
#include "lm/ops.h"

#include <vector>

namespace lm {

class CrossEntropy {
 public:
  /// Over columns [0, limit); a label outside gives log S, as Megatron does.
  CrossEntropy(std::vector<Index> labels, Index limit);
  /// Columns [first, first + block.columns()) of every row's logits, each column once over all ranks.
  void add(const Context& on, const Tensor& block, Index first);
  /// The loss of every row; all ranks of `tensor` get the same.
  std::vector<float> finish(Comm& tensor);

 private:
  std::vector<Index> labels_;
  Index limit_;
  std::vector<float> top_, target_;
  std::vector<double> sum_;
};

}  // namespace lm
