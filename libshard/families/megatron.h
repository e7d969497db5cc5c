// The table of Megatron-Core models: every tensor a GPT model of it can have, in its three spellings.
#pragma once

#include "libshard/family.h"
#include "libshard/layout.h"

namespace shard {

/// Dialect letters: 'd' torch_dist keys, 'l' module names of the local spec, 't' of the Transformer Engine spec.
std::vector<Row> megatron_rows();

/// Fills in what follows from other sizes: groups, ratio (query heads per group), head, expert_ffn.
void complete(Params& params);

/// Throws BadLayout, with the reason, where a model of these sizes cannot be cut so many ways.
void check_tensor_parallel(const Params& params, Index tp, Index etp);

/// The size of the dimension that is cut, how many ways, and which rank a cell is.
struct Side {
  int dim = -1;
  Index ways = 1, rank = 0;
};
Side side_of(const Row& row, const Parallel& parallel, const Cell& cell);

/// Whether a module (a key without "._extra_state") has one: linears do.
bool has_extra_state(std::string_view module);

}  // namespace shard
