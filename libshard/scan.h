// How every byte of stored tensors is looked at once: tasks that any executor takes, and what their counts say.
#pragma once

#include "libshard/numeric.h"
#include "libshard/source.h"

#include <map>
#include <string>
#include <vector>

namespace shard {

/// Bytes [begin, end) of one shard: of a dense one a part, else all.
struct ScanTask {
  const ShardedTensor* tensor;
  const Shard* shard;
  std::uint64_t begin, end;
};

/// In the order of the streams; `source` is told what will be read.
std::vector<ScanTask> scan_tasks(const ShardedStateDict& stored, SummedSource& source);
/// A shard's elements lie together, in row-major order.
bool dense(const ShardedTensor& tensor, const Shard& shard);
/// The loops that put a shard's elements together in row-major order.
Copy in_place(const ShardedTensor& tensor, const Shard& shard);

/// Counts of another part; the lower first one stays.
void add_counts(const NonFinite& more, NonFinite& sum);
/// By tensor; `found` by task, its `first` counts elements of the shard's box in row-major order.
std::vector<Finding> nonfinite_findings(const ShardedStateDict& stored, const std::vector<ScanTask>& tasks, const std::vector<NonFinite>& found);

}  // namespace shard
