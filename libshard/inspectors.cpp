// Walks over whole checkpoints, dealt out to threads in leaves; what is found is summed up in order.
#include "libshard/inspectors.h"

#include "libshard/error.h"
#include "libshard/parallel.h"
#include "libshard/range_reader.h"
#include "libshard/stop.h"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace shard {
namespace {

constexpr std::uint64_t kLeaf = 1 << 18;  // part of the digest's definition

Index elements_that_count(const ShardedTensor& tensor, std::optional<Index> vocab) {
  const auto all = volume(tensor.global_shape);
  if (!tensor.vocabulary || tensor.global_shape.empty() || tensor.global_shape[0] == 0) return all;
  return all / tensor.global_shape[0] * rows_that_count(tensor, vocab);
}

void touch_all(SummedSource& source, const ShardedStateDict& dict) {
  for (const auto& [key, tensor] : dict.tensors)
    for (const auto& shard : tensor.shards) source.touch(shard.place.stream, key);
}

}  // namespace

void compare_copies(SummedSource& source, const Budget& budget, std::vector<Finding>& findings) {
  const auto plan = compare_replicas(source.reader().describe());
  std::vector<Difference> differences(plan.comparisons.size());
  std::vector<Buffers> buffers(std::max(1u, budget.threads));
  const auto block = block_size(budget);
  run_tasks(differences.size(), budget.threads, [&](std::size_t i, unsigned worker) {
    refuse_stopped(budget.stop);
    differences[i] = compare_places(source, plan.comparisons[i], block, buffers[worker]);
  });
  for (std::size_t i = 0; i < differences.size(); ++i)
    if (differences[i].count)
      findings.push_back(describe_difference(source, plan.tensors[plan.comparisons[i].copy.tensor], plan.comparisons[i], differences[i]));
}

Index rows_that_count(const ShardedTensor& tensor, std::optional<Index> vocab) {
  const auto rows = tensor.global_shape.empty() ? 0 : tensor.global_shape[0];
  return tensor.vocabulary && vocab ? std::min(*vocab, rows) : rows;
}

std::map<std::string, Digest> digest_tensors(const Reader& from, std::optional<Index> vocab, HashBytes hash, const Kernels& kernels,
                                             const Budget& budget, std::vector<Finding>& findings, const Progress& tell) {
  const auto& dict = from.describe();
  SummedSource source(from, kernels);
  touch_all(source, dict);
  struct Leaf {
    std::size_t tensor;
    Index lo, hi;
  };
  std::vector<const ShardedTensor*> tensors;
  std::vector<RangeReader> readers;
  std::vector<Leaf> leaves;
  std::vector<std::size_t> first_leaf;
  std::uint64_t all = 0;
  for (const auto& [key, tensor] : dict.tensors) {
    const auto elements = elements_that_count(tensor, vocab), per_leaf = static_cast<Index>(kLeaf / size_of(tensor.dtype));
    first_leaf.push_back(leaves.size());
    for (Index lo = 0; lo < elements; lo += per_leaf) leaves.push_back({tensors.size(), lo, std::min(elements, lo + per_leaf)});
    all += static_cast<std::uint64_t>(elements) * size_of(tensor.dtype);
    tensors.push_back(&tensor);
    readers.emplace_back(source, tensor);
  }
  first_leaf.push_back(leaves.size());
  std::vector<Digest> digests(leaves.size());
  std::vector<Buffers> buffers(std::max(1u, budget.threads));
  std::atomic<std::uint64_t> done = 0;
  run_tasks(leaves.size(), budget.threads, [&](std::size_t i, unsigned worker) {
    refuse_stopped(budget.stop);
    const auto& leaf = leaves[i];
    const auto bytes = Buffers::need(buffers[worker].c, static_cast<std::uint64_t>(leaf.hi - leaf.lo) * size_of(tensors[leaf.tensor]->dtype));
    readers[leaf.tensor].read(leaf.lo, leaf.hi, bytes, buffers[worker]);
    digests[i] = hash(bytes);
    if (tell) tell(done += bytes.size(), all);
  });
  std::map<std::string, Digest> out;
  for (std::size_t t = 0; t < tensors.size(); ++t) {
    auto shape = tensors[t]->natural;
    if (tensors[t]->vocabulary && !shape.empty()) shape[0] = rows_that_count(*tensors[t], vocab);
    auto text = fmt::format("{} {}", name(tensors[t]->dtype), to_string(shape));
    text.append(reinterpret_cast<const char*>(digests.data() + first_leaf[t]), (first_leaf[t + 1] - first_leaf[t]) * sizeof(Digest));
    out[tensors[t]->key] = hash(std::as_bytes(std::span(text.data(), text.size())));
  }
  compare_copies(source, budget, findings);
  source.finish(budget, findings);
  return out;
}

std::vector<TensorDifference> diff_tensors(const Reader& a, std::optional<Index> vocab_a, const Reader& b, std::optional<Index> vocab_b,
                                           const Kernels& kernels, const Budget& budget, std::vector<Finding>& findings, const Progress& tell) {
  SummedSource source_a(a, kernels), source_b(b, kernels);
  touch_all(source_a, a.describe());
  touch_all(source_b, b.describe());
  struct Pair {
    const ShardedTensor *a, *b;
    Index elements;
    RangeReader reader_a, reader_b;
  };
  struct Leaf {
    std::size_t pair;
    Index lo, hi;
  };
  std::vector<TensorDifference> out;
  std::vector<Pair> pairs;
  std::vector<Leaf> leaves;
  std::uint64_t all = 0;
  for (const auto& [key, left] : a.describe().tensors) {
    const auto found = b.describe().tensors.find(key);
    if (found == b.describe().tensors.end()) continue;
    const auto& right = found->second;
    auto shape_a = left.natural, shape_b = right.natural;
    if (left.vocabulary && right.vocabulary && !shape_a.empty() && !shape_b.empty()) {
      shape_a[0] = rows_that_count(left, vocab_a);
      shape_b[0] = rows_that_count(right, vocab_b);
    }
    if (left.dtype != right.dtype || shape_a != shape_b) {
      out.push_back({key, {}, fmt::format("{} {} against {} {}", name(left.dtype), to_string(shape_a), name(right.dtype), to_string(shape_b))});
      continue;
    }
    const auto elements = volume(shape_a), per_leaf = static_cast<Index>(kLeaf / size_of(left.dtype));
    for (Index lo = 0; lo < elements; lo += per_leaf) leaves.push_back({pairs.size(), lo, std::min(elements, lo + per_leaf)});
    all += static_cast<std::uint64_t>(elements) * size_of(left.dtype);
    pairs.push_back({&left, &right, elements, RangeReader(source_a, left), RangeReader(source_b, right)});
  }
  std::vector<Difference> differences(leaves.size());
  struct Both {
    Buffers work;
    std::vector<std::byte> a, b;
  };
  std::vector<Both> buffers(std::max(1u, budget.threads));
  std::atomic<std::uint64_t> done = 0;
  run_tasks(leaves.size(), budget.threads, [&](std::size_t i, unsigned worker) {
    refuse_stopped(budget.stop);
    const auto& leaf = leaves[i];
    const auto& pair = pairs[leaf.pair];
    auto& mine = buffers[worker];
    const auto bytes = static_cast<std::uint64_t>(leaf.hi - leaf.lo) * size_of(pair.a->dtype);
    const auto left = Buffers::need(mine.a, bytes), right = Buffers::need(mine.b, bytes);
    pair.reader_a.read(leaf.lo, leaf.hi, left, mine.work);
    pair.reader_b.read(leaf.lo, leaf.hi, right, mine.work);
    differences[i] = compare(left, right, pair.a->dtype);
    if (tell) tell(done += bytes, all);
  });
  std::vector<Difference> sums(pairs.size());
  for (std::size_t i = 0; i < leaves.size(); ++i) {
    auto& sum = sums[leaves[i].pair];
    const auto& one = differences[i];
    if (one.count && !sum.count) sum.first = static_cast<std::uint64_t>(leaves[i].lo) + one.first;
    sum.count += one.count;
    sum.max_abs = std::max(sum.max_abs, one.max_abs);
    sum.max_rel = std::max(sum.max_rel, one.max_rel);
    sum.max_ulp = std::max(sum.max_ulp, one.max_ulp);
  }
  for (std::size_t p = 0; p < pairs.size(); ++p)
    if (sums[p].count) out.push_back({pairs[p].a->key, sums[p], ""});
  compare_copies(source_a, budget, findings);
  compare_copies(source_b, budget, findings);
  source_a.finish(budget, findings);
  source_b.finish(budget, findings);
  return out;
}

}  // namespace shard
