// Walks over whole checkpoints, dealt out to threads in leaves; what is found is summed up in order.
#include "libshard/inspectors.h"

#include "libshard/error.h"
#include "libshard/parallel.h"
#include "libshard/range_reader.h"
#include "libshard/source.h"

#include <algorithm>
#include <cstring>
#include <mutex>
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

/// Where elements lie together: the same loops as a copy of the shard onto itself.
Copy in_place(const ShardedTensor& tensor, const Shard& shard) {
  Copy copy{0, shard.place.stream, 0, shard.place.offset, 0, {}, size_of(tensor.dtype), tensor.dtype, tensor.dtype};
  const auto stride = row_major(shard.box.size);
  for (std::size_t d = 0; d < shard.box.size.size(); ++d)
    if (shard.box.size[d] > 1) copy.steps.push_back({shard.box.size[d], shard.place.stride[d], stride[d] * static_cast<Index>(size_of(tensor.dtype))});
  return copy;
}

bool dense(const ShardedTensor& tensor, const Shard& shard) {
  auto stride = row_major(shard.box.size);
  for (std::size_t d = 0; d < stride.size(); ++d)
    if (shard.box.size[d] > 1 && shard.place.stride[d] != stride[d] * static_cast<Index>(size_of(tensor.dtype))) return false;
  return true;
}

/// The numbers of one shard that are not finite; `first` counts elements of its box in row-major order.
NonFinite scan_shard(SummedSource& source, const ShardedTensor& tensor, const Shard& shard, std::uint64_t begin, std::uint64_t end,
                     std::uint64_t block, Buffers& buffers) {
  NonFinite sum;
  const auto item = size_of(tensor.dtype);
  const auto add = [&](std::span<const std::byte> bytes, std::uint64_t first_element) {
    const auto found = count_nonfinite(bytes, tensor.dtype);
    if (found.nan + found.inf && sum.nan + sum.inf == 0) sum.first = first_element + found.first;
    sum.nan += found.nan;
    sum.inf += found.inf;
  };
  if (dense(tensor, shard)) {
    for (auto at = begin; at < end; at += block) {
      const auto bytes = Buffers::need(buffers.a, std::min(block, end - at));
      source.read(shard.place.stream, shard.place.offset + at, bytes);
      if (source.summed(shard.place.stream)) source.add_sum(shard.place.stream, shard.place.offset + at, bytes);
      add(bytes, at / item);
    }
    return sum;
  }
  const auto copy = in_place(tensor, shard);
  const auto dims = tile_dims(copy);
  std::uint64_t done = 0;
  for_each_tile(copy, dims, 0, static_cast<std::uint64_t>(dims.front().count), block, [&](const auto& extent, std::uint64_t from, std::uint64_t) {
    const auto bytes = source.gather(copy.from_stream, from, end_runs(dims, extent, true, static_cast<Index>(item)), dims, extent,
                                     static_cast<Index>(item), buffers.a, buffers.b);
    add(bytes, done);
    done += bytes.size() / item;
  });
  return sum;
}

}  // namespace

Index rows_that_count(const ShardedTensor& tensor, std::optional<Index> vocab) {
  const auto rows = tensor.global_shape.empty() ? 0 : tensor.global_shape[0];
  return tensor.vocabulary && vocab ? std::min(*vocab, rows) : rows;
}

std::vector<Finding> scan_bytes(const Reader& from, const ShardedStateDict& stored, const Plan& replicas, const Kernels& kernels,
                                const Budget& budget, const Progress& tell) {
  SummedSource source(from, kernels);
  struct Task {
    const ShardedTensor* tensor;
    const Shard* shard;
    std::uint64_t begin, end;
  };
  std::vector<Task> tasks;
  std::uint64_t all = 0;
  for (const auto& [key, tensor] : stored.tensors)
    for (const auto& shard : tensor.shards) {
      if (empty(shard.box)) continue;
      source.touch(shard.place.stream, key);
      const auto bytes = static_cast<std::uint64_t>(volume(shard.box.size)) * size_of(tensor.dtype);
      all += bytes;
      const auto step = dense(tensor, shard) ? kUnit : std::max<std::uint64_t>(bytes, 1);
      for (std::uint64_t at = 0; at < bytes; at += step) tasks.push_back({&tensor, &shard, at, std::min(bytes, at + step)});
    }
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) {
    return std::tie(a.shard->place.stream, a.shard->place.offset, a.begin) < std::tie(b.shard->place.stream, b.shard->place.offset, b.begin);
  });
  const auto block = block_size(budget);
  std::vector<NonFinite> found(tasks.size());
  std::vector<Difference> differences(replicas.comparisons.size());
  std::vector<Buffers> buffers(std::max(1u, budget.threads));
  std::atomic<std::uint64_t> done = 0;
  run_tasks(tasks.size() + differences.size(), budget.threads, [&](std::size_t i, unsigned worker) {
    require(!budget.stop || !*budget.stop, Code::Io, [] { return "stopped by a signal"; });
    if (i >= tasks.size()) {
      auto& difference = differences[i - tasks.size()];
      difference = compare_places(source, replicas.comparisons[i - tasks.size()], block, buffers[worker]);
      return;
    }
    found[i] = scan_shard(source, *tasks[i].tensor, *tasks[i].shard, tasks[i].begin, tasks[i].end, block, buffers[worker]);
    if (tell) tell(done += tasks[i].end - tasks[i].begin, all);
  });
  std::vector<Finding> out;
  std::map<std::string, NonFinite> sums;
  for (std::size_t i = 0; i < tasks.size(); ++i) {
    if (found[i].nan + found[i].inf == 0) continue;
    const auto& tensor = *tasks[i].tensor;
    const auto index = unravel(static_cast<Index>(found[i].first), tasks[i].shard->box.size);
    std::uint64_t flat = 0;
    for (std::size_t d = 0; d < index.size(); ++d)
      flat = flat * static_cast<std::uint64_t>(tensor.global_shape[d]) + static_cast<std::uint64_t>(tasks[i].shard->box.lo[d] + index[d]);
    auto& sum = sums[tensor.key];
    sum.first = sum.nan + sum.inf ? std::min(sum.first, flat) : flat;
    sum.nan += found[i].nan;
    sum.inf += found[i].inf;
  }
  for (const auto& [key, sum] : sums)
    out.push_back({"nonfinite", Finding::Severity::Error, key,
                   fmt::format("{} NaN and {} Inf, first at {}", sum.nan, sum.inf,
                               to_string(unravel(static_cast<Index>(sum.first), stored.tensors.at(key).global_shape)))});
  source.finish(budget.threads, out);
  for (std::size_t i = 0; i < differences.size(); ++i)
    if (differences[i].count)
      out.push_back(describe_difference(source, replicas.tensors[replicas.comparisons[i].copy.tensor], replicas.comparisons[i], differences[i]));
  return out;
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
    require(!budget.stop || !*budget.stop, Code::Io, [] { return "stopped by a signal"; });
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
  source.finish(budget.threads, findings);
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
    require(!budget.stop || !*budget.stop, Code::Io, [] { return "stopped by a signal"; });
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
  source_a.finish(budget.threads, findings);
  source_b.finish(budget.threads, findings);
  return out;
}

}  // namespace shard
