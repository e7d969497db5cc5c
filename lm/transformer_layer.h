// One decoder layer on one rank: its share of the heads and of the feed-forward rows; sums are joined over the tensor group.
#pragma once

#include "libshard/transformer_config.h"
#include "lm/comm.h"
#include "lm/ops.h"
#include "lm/parts.h"

#include <string>
#include <vector>

namespace lm {

/// What the layers of one rank share.
struct RankContext {
  const shard::TransformerConfig& config;
  Weights& weights;                            ///< the rank's parts
  Ops& on;
  Comm& tensor;
};

/// The weights that layer `prefix` uses, in order.
std::vector<WeightUse> layer_uses(const WeightSource& source, const shard::TransformerConfig& config, const shard::LayerConfig& layer,
                                  const std::string& prefix, int times);

/// The layer's last branch: `hidden` [batch·length, hidden] plus it is the layer's output, a sum that may be one with the norm behind it. Rows
/// are sequences of `length` after one another. `rope` has the angles of positions 0 … length−1, or nothing where no rotation is wanted.
[[nodiscard]] Tensor layer_forward(RankContext& rank, const shard::LayerConfig& layer, const std::string& prefix, const Rope& rope, Index length,
                   Tensor& hidden);

}  // namespace lm
