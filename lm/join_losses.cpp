// In f64 where a rank is alone; between ranks in f32, as Megatron reduces.
#include "lm/ops.h"

#include <cmath>

namespace lm {

std::vector<float> join_losses(const std::vector<Index>& labels, Index limit, std::vector<float> top, std::vector<double> sum, std::vector<float> target, Comm& tensor) {
  if (tensor.size() > 1) {
    const auto mine = top;
    tensor.all_reduce_max(top);
    std::vector<float> sums(sum.size());
    for (std::size_t i = 0; i < sums.size(); ++i)
      sums[i] = sum[i] == 0 ? 0.0f : static_cast<float>(sum[i] * std::exp(static_cast<double>(mine[i]) - static_cast<double>(top[i])));
    tensor.all_reduce_sum(target);
    tensor.all_reduce_sum(sums);
    for (std::size_t i = 0; i < sums.size(); ++i) sum[i] = static_cast<double>(sums[i]);
  }
  std::vector<float> out(labels.size());
  for (std::size_t i = 0; i < out.size(); ++i) {
    // A label out of range counts as p = 0 behind the shift, not before it.
    const bool known = labels[i] >= 0 && labels[i] < limit;
    const auto p = known ? static_cast<double>(target[i]) - static_cast<double>(top[i]) : 0.0;
    out[i] = static_cast<float>(std::log(sum[i]) - p);
  }
  return out;
}

}  // namespace lm
