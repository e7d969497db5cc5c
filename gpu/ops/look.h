// What weights and hidden states look like: finite, more than one number, how large; and a digest of their bits.
#pragma once

#include "gpu/runtime.h"
#include "gpu/view.h"

namespace gpu {

/// As lm::Sight, on the device.
struct WeightLook {
  double squares = 0;  ///< their sum
  float max_abs = 0;   ///< not a number or infinite where one element is
  std::uint32_t nonfinite = 0, constant = 1;
  std::uint32_t pad = 0;
};
/// Of F32 or BF16 elements; scratch of look_scratch_bytes().
void look_at_weight(StreamView on, const View& weight, std::byte* scratch, WeightLook* out);

/// Over finite elements, but for the count and the digest.
struct ActivationLook {
  double squares = 0;
  std::uint64_t nonfinite = 0;
  std::uint64_t digest = 0;  ///< that of lm/digest.h
  float max_abs = 0;
  std::uint32_t pad = 0;
};
void look_at_activation(StreamView on, const View& x, std::byte* scratch, ActivationLook* out);

std::size_t look_scratch_bytes();

}  // namespace gpu
