// Cross entropy over a vocabulary that is cut among ranks and arrives in blocks of logits; as lm::CrossEntropy. What is kept is three
// numbers a row.
#pragma once

#include "gpu/runtime.h"
#include "gpu/view.h"

namespace gpu {

/// [rows] each, on the device.
struct CrossEntropyState {
  float* top = nullptr;     ///< running maximum
  double* sum = nullptr;    ///< of e^(x − top)
  float* target = nullptr;  ///< the label's logit, 0 where another rank has it
  std::int64_t rows = 0;
};

/// What is noted of logits beside; on the device, zeros at the start.
struct LogitsPeak {
  unsigned peak_bits = 0;  ///< of the largest finite |x| as f32: numbers ≥ 0 are ordered as their bits
  unsigned pad = 0;
  unsigned long long nonfinite = 0;
};

/// Nothing has been seen.
void cross_entropy_start(StreamView on, const CrossEntropyState& state);
/// Logits of columns [first, first + block.columns) that are below `limit`; each column once over all ranks. Labels on the device. `peak`
/// or none: joined with what is seen.
void cross_entropy_add(StreamView on, const CrossEntropyState& state, const View& block, std::int64_t first, std::int64_t limit,
                       const std::int64_t* labels, LogitsPeak* peak = nullptr);
/// Towards the maximum of all ranks: sum becomes that of e^(x − top). Behind it the sums and targets of ranks add up.
void cross_entropy_shift(StreamView on, const CrossEntropyState& state, const float* top);
/// losses[r] = log sum − (target − top); a label outside [0, limit) gives log sum.
void cross_entropy_finish(StreamView on, const CrossEntropyState& state, std::int64_t limit, const std::int64_t* labels, float* losses);

}  // namespace gpu
