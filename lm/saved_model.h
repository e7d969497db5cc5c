// The model that a rank computes, as Megatron's state dicts see it: sizes from the configuration, switches from which weights there are.
#pragma once

#include "libshard/rank_state_dict.h"
#include "libshard/transformer_config.h"
#include "lm/weights.h"

namespace lm {

/// For models that Megatron can express; what it has no module for is left out.
shard::GptModel saved_model(const shard::TransformerConfig& config, const WeightSource& source);

}  // namespace lm
