// Sizes from two budgets, and the turns that lanes take.
#include "gpu/reshard/workers.h"

#include "libshard/error.h"
#include "libshard/parallel.h"
#include "libshard/stop.h"

#include <algorithm>
#include <limits>

namespace gpu::reshard {
namespace {

constexpr std::uint64_t kLeastImage = 64 << 10, kMostImage = 16 << 20, kMostLanes = 16, kWorthLane = 4 << 20;

}  // namespace

Sizes size_lanes(std::uint64_t bytes, const shard::Budget& budget, const Options& options) {
  Sizes out;
  const auto least = Lane::device_memory(kLeastImage);
  auto device = std::numeric_limits<std::uint64_t>::max();  // what each has for buffers
  for (const auto index : options.devices) {
    const auto info = device_info(index);
    const auto mine = options.device_memory ? options.device_memory : info.free / 4;
    shard::require(mine >= least && info.free >= least, shard::Code::Device, [&] {
      return fmt::format("device: {} of {} bytes are free on device {} and {} are for buffers; {} is the least", info.free, info.memory, index, mine, least);
    });
    device = std::min({device, mine, info.free});
  }
  const auto memory = std::max(std::min(budget.memory, device * options.devices.size()), least);
  const auto most = std::min<std::uint64_t>(kMostLanes, 2 * std::max(1u, budget.threads));
  const auto lanes = std::clamp<std::uint64_t>(std::min(memory, 2 * bytes) / kWorthLane, 1, most), workers = (lanes + 1) / 2;
  const auto devices = std::min<std::uint64_t>(workers, options.devices.size());
  const auto most_on_one = std::min(lanes, (workers + devices - 1) / devices * 2);
  out.lanes = static_cast<unsigned>(lanes);
  out.devices = static_cast<unsigned>(devices);
  const auto room = std::min(memory / lanes, device / most_on_one) - Lane::device_memory(0);
  out.image = std::clamp<std::uint64_t>(std::min(room / 2, 2 * bytes), kLeastImage, kMostImage) / 256 * 256;
  out.pinned_memory = lanes * Lane::pinned_memory(out.image);
  out.device_memory = lanes * Lane::device_memory(out.image);
  return out;
}

std::string storage_line(const DirectChoice& direct, const Shared& shared) {
  if (!direct.storage) return fmt::format("pinned memory: {}", direct.why);
  return fmt::format("{}; {} bytes read and {} written so", direct.why, shared.read_directly.load(), shared.written_directly.load());
}

Workers::Workers(const Sizes& sizes, const std::vector<int>& devices, const shard::Budget& budget, Shared& shared, std::function<void(std::uint64_t)> told)
    : devices_(devices), budget_(budget), told_(std::move(told)), workers_((sizes.lanes + 1) / 2) {
  for (unsigned i = 0; i < sizes.lanes; ++i) {
    enter(i / 2);
    workers_[i / 2].lanes.push_back(std::make_unique<Lane>(sizes.image, shared));
  }
}

void Workers::run(std::size_t count, const std::function<void(std::size_t i, Batch& open, const Full& full)>& expand) {
  const auto threads = static_cast<unsigned>(workers_.size());
  shard::run_tasks(count, threads, [&](std::size_t i, unsigned worker) {
    enter(worker);
    expand(i, workers_[worker].open, [&](Batch& batch) { start(workers_[worker], batch); });
  });
  shard::run_tasks(workers_.size(), threads, [&](std::size_t i, unsigned) {
    enter(i);
    auto& worker = workers_[i];
    if (!worker.open.empty()) start(worker, worker.open);
    for (std::size_t lane = 0; lane < worker.lanes.size(); ++lane) told_(worker.lanes[(worker.next + lane) % worker.lanes.size()]->finish());
  });
}

void Workers::start(Worker& worker, Batch& batch) {
  shard::refuse_stopped(budget_.stop);
  auto& lane = *worker.lanes[worker.next];
  worker.next = (worker.next + 1) % worker.lanes.size();
  told_(lane.finish());
  lane.start(batch);
}

}  // namespace gpu::reshard
