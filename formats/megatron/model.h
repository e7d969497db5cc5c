// What mp_rank and torch_dist checkpoints have in common once read: from stored keys to logical tensors, ties, findings.
#pragma once

#include "formats/checkpoint.h"
#include "formats/torch_save.h"

namespace formats::megatron {

/// Completes `checkpoint` from its stored tensors, args and params: logical tensors, ties, expected content.
/// `dialects`: the letters of the table that its keys use.
void interpret(Checkpoint& checkpoint, std::string_view dialects, const OpenOptions& options);

/// The extra state that a node of a torch.save file stands for; `file` gives a tensor's bytes.
ExtraState extra_state(const File& file, const TorchFile& archive, pickle::Ref node);

/// "…_extra_state" → the logical name of the module's first tensor; "" where no row spells its weight.
std::string extra_state_name(const shard::Table& table, const shard::Params& params, std::string_view key);

}  // namespace formats::megatron
