// Rotary embedding of q and k.
#pragma once

#include "gpu/runtime.h"
#include "gpu/view.h"

namespace gpu {

/// A table in device memory: cos and sin [positions, half] in f32, as lm::rope_table makes them.
struct RopeView {
  const float* cos = nullptr;
  const float* sin = nullptr;
  std::int64_t half = 0;  ///< 0: nothing turns
  bool interleaved = false;
};

/// Turns the first 2·half lanes of each head in place: head h of a row starts h·head_stride behind x's first column. Row r has position
/// r mod length.
void apply_rope(StreamView on, const RopeView& table, const View& x, std::int64_t heads, std::int64_t head_stride, std::int64_t length);

}  // namespace gpu
