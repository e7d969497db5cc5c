// Where every stored tensor of a target comes from, read off a plan: boxes of the source, and what was done to them.
#pragma once

#include "libshard/plan.h"

#include <functional>
#include <set>
#include <string>
#include <vector>

namespace shard {

/// Part of one stored shard of the source.
struct Origin {
  const ShardedTensor* tensor;
  const Shard* shard;
  Box box;  ///< in the stored tensor: the smallest that holds all that was taken
};

struct Provenance {
  const ShardedTensor* target;
  std::vector<Origin> origins;       ///< in the order in which they lie in the target
  /// Of "copied", "cut" (less than a shard was taken), "concatenated" (several shards), "fused" (several tensors joined),
  /// "interleaved" (fused in turns), "split" (rows of one tensor picked out of a fused one), "transposed", "cast",
  /// "padded" (rows that the source does not have), "made" (of no stored tensor: zeros that the format asks for).
  std::set<std::string> transforms;
};

/// Calls visit once for every tensor of `target`, all of which the plan writes, in order of key. `source` and `target` describe
/// stored tensors by the streams that the plan speaks of. Takes memory for the tensors' places, not for their bytes.
void trace(const Plan& plan, const ShardedStateDict& source, const ShardedStateDict& target, const std::function<void(const Provenance&)>& visit);

}  // namespace shard
