// Why two checkpoints differ: which of the mistakes that people make would explain each difference.
#pragma once

#include "libshard/family.h"
#include "libshard/inspectors.h"

#include <map>
#include <optional>
#include <string>
#include <vector>

namespace shard {

/// One side of a comparison: logical tensors, and how many vocabulary rows are true ones.
struct HintSide {
  const Reader& reader;
  std::optional<Index> vocab;
};

/// A line of text per logical key that is explained: "gate and up are exchanged". A key without one is a difference
/// that no known mistake explains. `different` is what diff_tensors(a, b) found; a head that only one side holds is
/// looked at as well. `params` may name "heads", "groups", "head", "nope", "rope_dim", "kv_lora"; hypotheses about heads
/// need them. Deterministic. Looks at samples, so a hint is evidence and no proof: memory stays below 64 MiB beside the
/// dictionaries, and of each tensor at most a few hundred short rows are read. Throws what reading throws.
std::map<std::string, std::string> explain(const HintSide& a, const HintSide& b, const std::vector<TensorDifference>& different,
                                           const Params& params, HashBytes hash, const Kernels& kernels, const Budget& budget);

}  // namespace shard
