// A plan's units to the workers. Long runs that no sum is asked of are moved by the kernel of the system, past everything.
#include "gpu/reshard/execute.h"

#include "gpu/reshard/workers.h"
#include "libshard/kernel_copy.h"

namespace gpu::reshard {
namespace {

class Execution {
 public:
  Execution(const shard::Plan& plan, const shard::Reader& from, shard::Writer& to, const shard::Kernels& kernels, const shard::Budget& budget, const Options& options, const shard::Progress& tell)
      : plan_(plan), from_(from), budget_(budget), options_(options), tell_(tell), source_(from, kernels, &plan.memory), target_(to, kernels),
        shared_{source_, &target_, nullptr, std::vector<shard::Difference>(plan.comparisons.size()), {}, {}} {}

  Outcome run() {
    touch();
    out_.sizes = size_lanes(all_, budget_, options_);
    const auto direct = options_.direct ? direct_storage() : DirectChoice{nullptr, "not asked for"};
    shared_.direct = direct.storage.get();
    const Batches batches(plan_, out_.sizes.image);
    Workers(out_.sizes, options_.devices, budget_, shared_, [&](std::uint64_t bytes) { told(bytes); }).run(batches.units().size(), [&](std::size_t i, Batch& open, const Full& full) {
      const auto unit = past_everything(batches, batches.units()[i]);
      if (unit.begin < unit.end || unit.kind == Unit::Kind::Compare) batches.expand(unit, open, full);
    });
    auto& report = out_.report;
    source_.finish(budget_, report.findings);
    for (std::size_t i = 0; i < shared_.differences.size(); ++i)
      if (shared_.differences[i].count)
        report.findings.push_back(describe_difference(source_, plan_.tensors[plan_.comparisons[i].copy.tensor], plan_.comparisons[i], shared_.differences[i]));
    report.crc32 = target_.finish(plan_, budget_.threads);
    report.bytes_read = source_.bytes_read() + in_kernel_ + shared_.read_directly;
    report.bytes_written = target_.bytes_written();
    report.bytes_copied_in_kernel = in_kernel_;
    report.bytes_through_device = shared_.through_device;
    out_.storage = storage_line(direct, shared_);
    return std::move(out_);
  }

 private:
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
