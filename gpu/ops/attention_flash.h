// Between the flash kernels: by warpgroups, on tensor cores, and for what those do not take.
#pragma once

#include "gpu/ops/attention_kernel.h"

namespace gpu {

// False, and nothing done, where the kernel does not take these views, or the device has no such instructions.
bool flash_by_warpgroups(StreamView on, const AttentionScalars& scalars, const View& q, const View& k, const View& v, const View& out);
bool flash_on_tensor_cores(StreamView on, const AttentionScalars& scalars, const View& q, const View& k, const View& v, const View& out);

/// What a row's weighted sum is multiplied by at the end: the sink joins the sum first.
GPU_CODE float finishing_factor(const AttentionScalars& a, std::int64_t head, float top, float sum) {
  if (!a.has_sink()) return 1.0f / sum;
  const float sink = a.sink(head), all = larger(top, sink), factor = weight_towards(top, all);
  return factor / (sum * factor + expf(sink - all));
}

}  // namespace gpu
