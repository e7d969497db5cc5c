// The model and layout that Megatron's args describe, for the state dicts of its ranks.
#pragma once

#include "formats/megatron/args.h"
#include "libshard/rank_state_dict.h"

namespace formats::megatron {

/// Sizes, kinds of layers and number type; spec and metadata are as GptModel starts with, but for what args say of layers. The
/// vocabulary is padded_vocab_size, or vocab_size padded.
shard::GptModel gpt_model(const pickle::Graph& graph, const Args& args);
/// With the text of a pipeline layout.
shard::Parallel parallel_with_layout(const pickle::Graph& graph, const Args& args);

}  // namespace formats::megatron
