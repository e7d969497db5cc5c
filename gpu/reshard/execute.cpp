// Workers with two lanes each: while the device works for one, the worker reads into the other; with several workers reads, uploads,
// kernels, downloads and writes overlap. Long runs that no sum is asked of are moved by the kernel of the system, past everything.
#include "gpu/reshard/execute.h"

#include "gpu/reshard/lane.h"
#include "libshard/error.h"
#include "libshard/kernel_copy.h"
#include "libshard/parallel.h"

#include <algorithm>
#include <optional>

namespace gpu::reshard {
namespace {

constexpr std::uint64_t kLeastImage = 64 << 10, kMostImage = 16 << 20, kMostLanes = 16;

/// As many lanes as threads keep busy and both memories hold; images as large as they get, but no larger than `bytes` to be moved need.
void size_lanes(std::uint64_t bytes, const shard::Budget& budget, const Options& options, Outcome& out) {
  const auto info = device_info(options.device);
  const auto device = options.device_memory ? options.device_memory : info.free / 4;
  const auto least = Lane::device_memory(kLeastImage);
  shard::require(device >= least && info.free >= least, shard::Code::Device, [&] {
    return fmt::format("device: {} of {} bytes are free on device {} and {} are for buffers; {} is the least", info.free, info.memory, options.device, device, least);
  });
  const auto memory = std::max(std::min(budget.memory, std::min(device, info.free)), least);
  constexpr std::uint64_t kWorthLane = 4 << 20;
  const auto most = std::min<std::uint64_t>(kMostLanes, 2 * std::max(1u, budget.threads));
  const auto lanes = std::clamp<std::uint64_t>(std::min(memory, 2 * bytes) / kWorthLane, 1, most);
  out.lanes = static_cast<unsigned>(lanes);
  out.image = std::clamp<std::uint64_t>(std::min((memory / lanes - Lane::device_memory(0)) / 2, 2 * bytes), kLeastImage, kMostImage) / 256 * 256;
  out.pinned_memory = lanes * Lane::pinned_memory(out.image);
  out.device_memory = lanes * Lane::device_memory(out.image);
}

class Execution {
 public:
  Execution(const shard::Plan& plan, const shard::Reader& from, shard::Writer& to, const shard::Kernels& kernels, const shard::Budget& budget, const Options& options, const shard::Progress& tell)
      : plan_(plan), from_(from), budget_(budget), options_(options), tell_(tell), source_(from, kernels, &plan.memory), target_(to, kernels),
        shared_{source_, target_, nullptr, std::vector<shard::Difference>(plan.comparisons.size()), {}} {}

  Outcome run() {
    use_device(options_.device);
    touch();
    size_lanes(all_, budget_, options_, out_);
    const auto direct = options_.direct ? direct_storage() : DirectChoice{nullptr, "not asked for"};
    shared_.direct = direct.storage.get();
    const Batches batches(plan_, out_.image);
    carry_out(batches);
    auto& report = out_.report;
    source_.finish(budget_.threads, report.findings);
    for (std::size_t i = 0; i < shared_.differences.size(); ++i)
      if (shared_.differences[i].count)
        report.findings.push_back(describe_difference(source_, plan_.tensors[plan_.comparisons[i].copy.tensor], plan_.comparisons[i], shared_.differences[i]));
    report.crc32 = target_.finish(plan_, budget_.threads);
    report.bytes_read = source_.bytes_read() + in_kernel_ + shared_.read_directly;
    report.bytes_written = target_.bytes_written();
    report.bytes_copied_in_kernel = in_kernel_;
    report.bytes_through_device = shared_.through_device;
    out_.storage = direct.storage ? fmt::format("{}; {} bytes read and {} written so", direct.why, shared_.read_directly.load(), shared_.written_directly.load()) : fmt::format("pinned memory: {}", direct.why);
    return std::move(out_);
  }

 private:
  struct Worker {
    std::vector<std::unique_ptr<Lane>> lanes;
    std::size_t next = 0;
    Batch open;
  };

  void touch() {
    for (const auto& copy : plan_.copies) {
      source_.touch(copy.from_stream, plan_.tensors[copy.tensor]);
      all_ += copy.bytes();
    }
    for (const auto& [copy, box, tie] : plan_.comparisons) {
      source_.touch(copy.from_stream, plan_.tensors[copy.tensor]);
      source_.touch(copy.to_stream, plan_.tensors[copy.tensor]);
      all_ += copy.bytes();
    }
  }

  void carry_out(const Batches& batches) {
    std::vector<Worker> workers((out_.lanes + 1) / 2);
    for (unsigned i = 0; i < out_.lanes; ++i) workers[i / 2].lanes.push_back(std::make_unique<Lane>(out_.image, shared_));
    const auto threads = static_cast<unsigned>(workers.size());
    const auto& units = batches.units();
    shard::run_tasks(units.size(), threads, [&](std::size_t i, unsigned worker) {
      use_device(options_.device);
      auto& mine = workers[worker];
      const auto unit = past_everything(batches, units[i]);
      if (unit.begin < unit.end || unit.kind == Unit::Kind::Compare) batches.expand(unit, mine.open, [&](Batch& batch) { start(mine, batch); });
    });
    shard::run_tasks(workers.size(), threads, [&](std::size_t i, unsigned) {
      use_device(options_.device);
      if (!workers[i].open.empty()) start(workers[i], workers[i].open);
      for (std::size_t lane = 0; lane < workers[i].lanes.size(); ++lane) told(workers[i].lanes[(workers[i].next + lane) % workers[i].lanes.size()]->finish());
    });
  }

  /// What is left of a unit once the system's kernel moved what it could.
  Unit past_everything(const Batches& batches, Unit unit) {
    if (unit.kind != Unit::Kind::Contiguous) return unit;
    const auto& copy = batches.copy(unit);
    if (source_.summed(copy.from_stream) || target_.summed(copy.to_stream) || unit.end - unit.begin < shard::kKernelRun) return unit;
    const auto moved = shard::kernel_copy(from_, target_.writer(), copy, unit.begin, unit.end);
    in_kernel_ += moved;
    target_.add_written(moved);
    told(moved);
    unit.begin += moved;
    return unit;
  }

  void start(Worker& worker, Batch& batch) {
    shard::require(!budget_.stop || !*budget_.stop, shard::Code::Io, [] { return "stopped by a signal"; });
    auto& lane = *worker.lanes[worker.next];
    worker.next = (worker.next + 1) % worker.lanes.size();
    told(lane.finish());
    lane.start(batch);
  }

  void told(std::uint64_t bytes) {
    if (bytes == 0) return;
    const auto done = done_ += bytes;
    if (tell_) tell_(done, all_);
  }

  const shard::Plan& plan_;
  const shard::Reader& from_;
  const shard::Budget& budget_;
  const Options& options_;
  const shard::Progress& tell_;
  shard::SummedSource source_;
  shard::SummedTarget target_;
  Shared shared_;
  std::uint64_t all_ = 0;
  std::atomic<std::uint64_t> in_kernel_ = 0, done_ = 0;
  Outcome out_;
};

}  // namespace

Outcome execute(const shard::Plan& plan, const shard::Reader& from, shard::Writer& to, const shard::Kernels& kernels, const shard::Budget& budget,
                const Options& options, const shard::Progress& tell) {
  return Execution(plan, from, to, kernels, budget, options, tell).run();
}

}  // namespace gpu::reshard
