// Sums of exponentials in sixteen lanes, joined in f64.
#include "lm/cpu/cross_entropy.h"

#include "lm/cpu/numbers.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace lm::cpu {
namespace {

SHARD_CLONES double exp_sum(const float* x, Index n, float shift) {
  double lanes[16] = {};
  Index i = 0;
  for (; i + 16 <= n; i += 16)
    for (int l = 0; l < 16; ++l) lanes[l] += static_cast<double>(exp_f32(x[i + l] - shift));
  double sum = 0;
  for (const double lane : lanes) sum += lane;
  for (; i < n; ++i) sum += static_cast<double>(exp_f32(x[i] - shift));
  return sum;
}

/// The largest finite |x|; adds the others to `nonfinite`.
SHARD_CLONES float peak_of(const float* x, Index n, float peak, std::uint64_t& nonfinite) {
  Index bad = 0;
  for (Index i = 0; i < n; ++i) {
    const auto size = std::abs(x[i]);
    const bool finite = size <= std::numeric_limits<float>::max();
    peak = finite && size > peak ? size : peak;
    bad += !finite;
  }
  nonfinite += static_cast<std::uint64_t>(bad);
  return peak;
}

}  // namespace

CrossEntropy::CrossEntropy(Context on, std::vector<Index> labels, Index limit)
    : on_(on), labels_(std::move(labels)), limit_(limit), top_(labels_.size(), -std::numeric_limits<float>::infinity()), target_(labels_.size(), 0.0f),
      peak_(labels_.size(), 0.0f), nonfinite_(labels_.size(), 0), sum_(labels_.size(), 0.0) {}

void CrossEntropy::add(const Tensor& block, Index first) {
  const auto columns = std::min(block.columns(), limit_ - first);
  if (columns <= 0) return;
  parallel_ranges(on_, block.rows(), 8, [&](Index lo, Index hi) {
    for (Index r = lo; r < hi; ++r) {
      const auto at = static_cast<std::size_t>(r);
      const auto* x = block.row(r);
      const auto top = std::max(top_[at], max_of(x, columns));
      if (sum_[at] != 0) sum_[at] *= std::exp(static_cast<double>(top_[at]) - static_cast<double>(top));
      sum_[at] += exp_sum(x, columns, top);
      top_[at] = top;
      if (const auto label = labels_[at]; label >= first && label < first + columns) target_[at] = x[label - first];
      peak_[at] = peak_of(x, columns, peak_[at], nonfinite_[at]);
    }
  });
}

LossSum::Seen CrossEntropy::seen() {
  Seen out;
  for (std::size_t r = 0; r < peak_.size(); ++r) {
    out.max_abs = std::max(out.max_abs, static_cast<double>(peak_[r]));
    out.nonfinite += nonfinite_[r];
  }
  return out;
}

std::vector<float> CrossEntropy::finish(Comm& tensor) { return join_losses(labels_, limit_, top_, sum_, target_, tensor); }

}  // namespace lm::cpu
