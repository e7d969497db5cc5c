// The forward pass that belongs to an opened checkpoint, whatever its format.
#pragma once

#include "formats/checkpoint.h"
#include "libshard/transformer_config.h"

namespace formats {

/// From config.json beside the weights, or the one that a Megatron checkpoint carries from its conversion, else from
/// Megatron's args. Throws Mismatch where there is neither.
shard::TransformerConfig model_config(const Checkpoint& checkpoint);

}  // namespace formats
