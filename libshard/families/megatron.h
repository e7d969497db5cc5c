// The table of Megatron-Core models: every tensor a GPT model of it can have, in its three spellings.
#pragma once

#include "libshard/family.h"

namespace shard {

/// Dialect letters: 'd' torch_dist keys, 'l' module names of the local spec, 't' of the Transformer Engine spec.
std::vector<Row> megatron_rows();

/// Fills in what follows from other sizes: groups, ratio (query heads per group), head, expert_ffn.
void complete(Params& params);

/// Throws BadLayout, with the reason, where a model of these sizes cannot be cut so many ways.
void check_tensor_parallel(const Params& params, Index tp, Index etp);

}  // namespace shard
