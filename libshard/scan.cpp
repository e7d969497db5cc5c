// Dense shards in pieces, others whole; a shard's numbers are summed up into one finding a tensor.
#include "libshard/scan.h"

#include "libshard/error.h"
#include "libshard/inspectors.h"
#include "libshard/parallel.h"
#include "libshard/stop.h"

#include <algorithm>
#include <mutex>
#include <tuple>

namespace shard {
namespace {

/// The numbers of one shard that are not finite; `first` counts elements of its box in row-major order.
NonFinite scan_shard(SummedSource& source, const ShardedTensor& tensor, const Shard& shard, std::uint64_t begin, std::uint64_t end,
                     std::uint64_t block, const std::atomic<bool>* stop, Buffers& buffers) {
  NonFinite sum;
  const auto item = size_of(tensor.dtype);
  const auto add = [&](std::span<const std::byte> bytes, auto&& element) {
    refuse_stopped(stop);  // a view may have as many elements as it likes
    auto found = count_nonfinite(bytes, tensor.dtype);
    if (found.nan + found.inf == 0) return;
    found.first = element(found.first);
    add_counts(found, sum);
  };
  if (dense(tensor, shard)) {
    for (auto at = begin; at < end; at += block) {
      const auto bytes = Buffers::need(buffers.a, std::min(block, end - at));
      source.read(shard.place.stream, shard.place.offset + at, bytes);
      if (source.summed(shard.place.stream)) source.add_sum(shard.place.stream, shard.place.offset + at, bytes);
      add(bytes, [&](std::uint64_t i) { return at / item + i; });
    }
    return sum;
  }
  const auto copy = in_place(tensor, shard);
  const auto dims = tile_dims(copy);
  for_each_tile(copy, dims, 0, static_cast<std::uint64_t>(dims.front().count), block, [&](const auto& extent, std::uint64_t from, std::uint64_t to) {
    const auto bytes = source.gather(copy.from_stream, from, end_runs(dims, extent, true, static_cast<Index>(item)), dims, extent,
                                     static_cast<Index>(item), buffers.a, buffers.b);
    add(bytes, [&](std::uint64_t i) { return (to + target_offset(dims, extent, i)) / item; });
  });
  return sum;
}

}  // namespace

bool dense(const ShardedTensor& tensor, const Shard& shard) {
  auto stride = row_major(shard.box.size);
  for (std::size_t d = 0; d < stride.size(); ++d)
    if (shard.box.size[d] > 1 && shard.place.stride[d] != stride[d] * static_cast<Index>(size_of(tensor.dtype))) return false;
  return true;
}

Copy in_place(const ShardedTensor& tensor, const Shard& shard) {
  Copy copy{0, shard.place.stream, 0, shard.place.offset, 0, {}, size_of(tensor.dtype), tensor.dtype, tensor.dtype};
  const auto stride = row_major(shard.box.size);
  for (std::size_t d = 0; d < shard.box.size.size(); ++d)
    if (shard.box.size[d] > 1) copy.steps.push_back({shard.box.size[d], shard.place.stride[d], stride[d] * static_cast<Index>(size_of(tensor.dtype))});
  return copy;
}

void add_counts(const NonFinite& more, NonFinite& sum) {
  if (more.nan + more.inf == 0) return;
  sum.first = sum.nan + sum.inf ? std::min(sum.first, more.first) : more.first;
  sum.nan += more.nan;
  sum.inf += more.inf;
}

std::vector<ScanTask> scan_tasks(const ShardedStateDict& stored, SummedSource& source) {
  std::vector<ScanTask> tasks;
  for (const auto& [key, tensor] : stored.tensors)
    for (const auto& shard : tensor.shards) {
      if (empty(shard.box)) continue;
      source.touch(shard.place.stream, key);
      const auto bytes = static_cast<std::uint64_t>(volume(shard.box.size)) * size_of(tensor.dtype);
      const auto step = dense(tensor, shard) ? kUnit : std::max<std::uint64_t>(bytes, 1);
      for (std::uint64_t at = 0; at < bytes; at += step) tasks.push_back({&tensor, &shard, at, std::min(bytes, at + step)});
    }
  std::stable_sort(tasks.begin(), tasks.end(), [](const ScanTask& a, const ScanTask& b) {
    return std::tie(a.shard->place.stream, a.shard->place.offset, a.begin) < std::tie(b.shard->place.stream, b.shard->place.offset, b.begin);
  });
  return tasks;
}

std::vector<Finding> nonfinite_findings(const ShardedStateDict& stored, const std::vector<ScanTask>& tasks, const std::vector<NonFinite>& found) {
  std::map<std::string, NonFinite> sums;
  for (std::size_t i = 0; i < tasks.size(); ++i) {
    if (found[i].nan + found[i].inf == 0) continue;
    const auto& tensor = *tasks[i].tensor;
    const auto index = unravel(static_cast<Index>(found[i].first), tasks[i].shard->box.size);
    std::uint64_t flat = 0;
    for (std::size_t d = 0; d < index.size(); ++d)
      flat = flat * static_cast<std::uint64_t>(tensor.global_shape[d]) + static_cast<std::uint64_t>(tasks[i].shard->box.lo[d] + index[d]);
    add_counts({found[i].nan, found[i].inf, flat}, sums[tensor.key]);
  }
  std::vector<Finding> out;
  for (const auto& [key, sum] : sums)
    out.push_back({"nonfinite", Finding::Severity::Error, key,
                   fmt::format("{} NaN and {} Inf, first at {}", sum.nan, sum.inf,
                               to_string(unravel(static_cast<Index>(sum.first), stored.tensors.at(key).global_shape)))});
  return out;
}

std::vector<Finding> scan_bytes(const Reader& from, const ShardedStateDict& stored, const Plan& replicas, const Kernels& kernels,
                                const Budget& budget, const Progress& tell) {
  SummedSource source(from, kernels);
  const auto tasks = scan_tasks(stored, source);
  std::uint64_t all = 0;
  for (const auto& task : tasks) all += task.end - task.begin;
  const auto block = block_size(budget);
  std::vector<NonFinite> found(tasks.size());
  std::map<std::string, std::string> damaged;
  std::mutex damage_mutex;
  std::vector<Difference> differences(replicas.comparisons.size());
  std::vector<Buffers> buffers(std::max(1u, budget.threads));
  std::atomic<std::uint64_t> done = 0;
  run_tasks(tasks.size() + differences.size(), budget.threads, [&](std::size_t i, unsigned worker) {
    refuse_stopped(budget.stop);
    if (i >= tasks.size()) {
      auto& difference = differences[i - tasks.size()];
      difference = compare_places(source, replicas.comparisons[i - tasks.size()], block, buffers[worker]);
      return;
    }
    try {
      found[i] = scan_shard(source, *tasks[i].tensor, *tasks[i].shard, tasks[i].begin, tasks[i].end, block, budget.stop, buffers[worker]);
    } catch (const Error& error) {  // a damaged chunk of a compressed file: the others can still be checked
      if (error.code != Code::BadFormat) throw;
      const std::lock_guard lock(damage_mutex);
      damaged.try_emplace(tasks[i].tensor->key, error.what());
    }
    if (tell) tell(done += tasks[i].end - tasks[i].begin, all);
  });
  std::vector<Finding> out;
  for (const auto& [key, what] : damaged) out.push_back({"checksum", Finding::Severity::Error, key, what});
  for (auto& finding : nonfinite_findings(stored, tasks, found)) out.push_back(std::move(finding));
  source.finish(budget, out);
  for (std::size_t i = 0; i < differences.size(); ++i)
    if (differences[i].count)
      out.push_back(describe_difference(source, replicas.tensors[replicas.comparisons[i].copy.tensor], replicas.comparisons[i], differences[i]));
  return out;
}

}  // namespace shard
