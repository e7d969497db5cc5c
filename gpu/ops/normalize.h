// Norms over rows and over each head's lanes.
#pragma once

#include "gpu/runtime.h"
#include "gpu/view.h"
#include "libshard/transformer_config.h"

namespace gpu {

struct NormConfig {
  shard::Normalization kind = shard::Normalization::RMSNorm;
  double epsilon = 1e-5;
  bool zero_centered = false;  ///< × (1 + weight)
};

/// out = norm(x); `weight` and `bias` [columns] may be none.
void normalize(StreamView on, const NormConfig& config, const View& x, const View& weight, const View& bias, const View& out);
/// hidden += branch, rounded; out = norm(hidden).
void add_normalize(StreamView on, const NormConfig& config, const View& hidden, const View& branch, const View& weight, const View& bias,
                   const View& out);
/// In place over `pieces` runs of `width` lanes from each row's first.
void normalize_pieces(StreamView on, const NormConfig& config, const View& x, std::int64_t pieces, std::int64_t width, const View& weight,
                      const View& bias);

}  // namespace gpu
