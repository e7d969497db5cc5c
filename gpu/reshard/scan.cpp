// A scan's tasks and a plan's comparisons to the workers; what cannot be read at all is left to the CPU, which tells part from part.
#include "gpu/reshard/scan.h"

#include "gpu/reshard/workers.h"
#include "libshard/error.h"
#include "libshard/inspectors.h"

namespace gpu::reshard {
namespace {

ScanOutcome scan(const shard::Reader& from, const shard::ShardedStateDict& stored, const shard::Plan& replicas, const shard::Kernels& kernels,
                 const shard::Budget& budget, const Options& options, const shard::Progress& tell) {
  ScanOutcome out;
  shard::SummedSource source(from, kernels);
  const auto tasks = scan_tasks(stored, source);
  std::uint64_t all = 0;
  for (const auto& task : tasks) all += task.end - task.begin;
  for (const auto& comparison : replicas.comparisons) all += comparison.copy.bytes();
  out.sizes = size_lanes(all, budget, options);
  const auto direct = options.direct ? direct_storage() : DirectChoice{nullptr, "not asked for"};
  Shared shared{source, nullptr, direct.storage.get(), std::vector<shard::Difference>(replicas.comparisons.size()), std::vector<shard::NonFinite>(tasks.size()), {}};
  const Batches comparisons(replicas, out.sizes.image);
  std::atomic<std::uint64_t> done = 0;
  const auto told = [&](std::uint64_t bytes) {
    if (bytes > 0 && tell) tell(done += bytes, all);
  };
  Workers(out.sizes, options.devices, budget, shared, told).run(tasks.size() + comparisons.units().size(), [&](std::size_t i, Batch& open, const Full& full) {
    if (i < tasks.size()) expand(tasks[i], i, out.sizes.image, open, full);
    else comparisons.expand(comparisons.units()[i - tasks.size()], open, full);
  });
  out.findings = nonfinite_findings(stored, tasks, shared.found);
  source.finish(budget, out.findings);
  for (std::size_t i = 0; i < shared.differences.size(); ++i)
    if (shared.differences[i].count)
      out.findings.push_back(describe_difference(source, replicas.tensors[replicas.comparisons[i].copy.tensor], replicas.comparisons[i], shared.differences[i]));
  out.storage = storage_line(direct, shared);
  return out;
}

}  // namespace

ScanOutcome scan_bytes(const shard::Reader& from, const shard::ShardedStateDict& stored, const shard::Plan& replicas, const shard::Kernels& kernels,
                       const shard::Budget& budget, const Options& options, const shard::Progress& tell) {
  try {
    return scan(from, stored, replicas, kernels, budget, options, tell);
  } catch (const shard::Error& error) {
    if (error.code != shard::Code::BadFormat) throw;
    return {shard::scan_bytes(from, stored, replicas, kernels, budget, tell), fmt::format("the CPU: {}", error.what()), {}};
  }
}

}  // namespace gpu::reshard
