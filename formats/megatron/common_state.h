// The common state of a Megatron checkpoint that is no rank file: args and the little that travels beside the tensors.
#pragma once

#include "formats/target.h"
#include "formats/megatron/writers.h"

namespace formats::megatron {

/// Keeps args and what every layout can carry of a common state, a dict or a list of one; names the rest. Throws BadFormat.
void take_common(Checkpoint& checkpoint, pickle::Graph graph);

/// Parameters, layout and vocabulary from the args that take_common found; without args from the keys themselves.
void take_args(Checkpoint& checkpoint, const OpenOptions& options);

/// The pickle of a target's common state. args lose the classes that older cores refuse, so that every Megatron-Core
/// reads it; their names are added to the target's `dropped`.
std::string common_pickle(const Checkpoint& source, const Model& model, Target& target);

}  // namespace formats::megatron
