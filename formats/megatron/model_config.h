// What Megatron's forward pass would do, read from a checkpoint's args.
#pragma once

#include "formats/megatron/args.h"
#include "libshard/transformer_config.h"

namespace formats::megatron {

/// `vocab` is the true size where known; `params` may override sizes. Throws BadFormat naming the argument whose value
/// is not understood, Mismatch where sizes contradict each other.
shard::TransformerConfig model_config(const pickle::Graph& graph, pickle::Ref args, const shard::Params& params, std::optional<shard::Index> vocab);

}  // namespace formats::megatron
