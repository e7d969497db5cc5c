// The executor: contiguous runs in blocks (or in the kernel), rows of several files in step, everything else in tiles.
// Every byte is summed in the pass that moves it; what a pass could not sum in long pieces is read once more at the end.
#include "libshard/execute.h"

#include "libshard/bands.h"
#include "libshard/error.h"
#include "libshard/kernel_copy.h"
#include "libshard/parallel.h"
#include "libshard/source.h"
#include "libshard/stop.h"
#include "libshard/target.h"

#include <algorithm>
#include <tuple>

namespace shard {
namespace {

struct Unit {
  enum class Kind { Contiguous, Rows, Tiles, Compare } kind;
  std::size_t index;
  std::uint64_t begin, end;  // bytes, rows or turns of the outermost dimension
  std::uint32_t stream;      // where the bytes go: neighbours share a file
  std::uint64_t offset;
};

using Bytes = std::span<std::byte>;

/// `counting`: every byte that would be read or written is counted, none is moved.
class Execution {
 public:
  Execution(const Plan& plan, const Reader& from, Writer& to, const Kernels& kernels, const Budget& budget, const Progress& tell, bool counting = false)
      : plan_(plan), from_(from), to_(to), kernels_(kernels), budget_(budget), tell_(tell), counting_(counting), source_(from, kernels, &plan.memory, counting),
        target_(to, kernels), buffers_(std::max(1u, budget.threads)), block_(block_size(budget)) {}

  Report run() {
    plan_units();
    run_tasks(units_.size(), budget_.threads, [&](std::size_t i, unsigned worker) { carry_out(units_[i], buffers_[worker]); });
    source_.finish(budget_, report_.findings);
    for (std::size_t i = 0; i < differences_.size(); ++i)
      if (differences_[i].count)
        report_.findings.push_back(describe_difference(source_, plan_.tensors[plan_.comparisons[i].copy.tensor], plan_.comparisons[i], differences_[i]));
    if (!counting_) report_.crc32 = target_.finish(plan_, budget_.threads);
    report_.bytes_read = source_.bytes_read() + in_kernel_;
    report_.bytes_written = target_.bytes_written();
    report_.bytes_copied_in_kernel = in_kernel_;
    return std::move(report_);
  }

 private:
  // --- planning units -----------------------------------------------------------------------------------------------

  void plan_units() {
    std::vector<std::size_t> rest;
    groups_ = group_rows(plan_.copies, rest);
    for (const auto& copy : plan_.copies) {
      source_.touch(copy.from_stream, plan_.tensors[copy.tensor]);
      all_ += copy.bytes();
    }
    for (const auto& [copy, box, tie] : plan_.comparisons) {
      source_.touch(copy.from_stream, plan_.tensors[copy.tensor]);
      source_.touch(copy.to_stream, plan_.tensors[copy.tensor]);
      all_ += copy.bytes();
    }
    for (const auto i : rest) add_copy(i);
    for (std::size_t g = 0; g < groups_.size(); ++g) add_group(g);
    std::stable_sort(units_.begin(), units_.end(), [&](const Unit& a, const Unit& b) {
      return std::tie(target_.stream(a.stream).file, a.stream, a.offset) < std::tie(target_.stream(b.stream).file, b.stream, b.offset);
    });
    for (std::size_t i = 0; i < plan_.comparisons.size(); ++i)
      units_.push_back({Unit::Kind::Compare, i, 0, 0, 0, 0});
    differences_.resize(plan_.comparisons.size());
  }

  void add_copy(std::size_t index) {
    const auto& copy = plan_.copies[index];
    if (copy.steps.empty() && copy.from_type == copy.to_type && copy.from_stream < kMemoryStreams) {
      for (std::uint64_t at = 0; at < copy.run; at += kUnit)
        units_.push_back({Unit::Kind::Contiguous, index, at, std::min(copy.run, at + kUnit), copy.to_stream, copy.to + at});
      return;
    }
    const auto dims = tile_dims(copy);
    const auto turns = static_cast<std::uint64_t>(dims.front().count);
    const auto turn_bytes = std::max<std::uint64_t>(1, copy.bytes() / turns);
    const auto step = std::max<std::uint64_t>(1, kUnit / turn_bytes);
    for (std::uint64_t at = 0; at < turns; at += step)
      units_.push_back({Unit::Kind::Tiles, index, at, std::min(turns, at + step), copy.to_stream,
                        copy.to + at * static_cast<std::uint64_t>(dims.front().to)});
  }

  void add_group(std::size_t g) {
    const auto& group = groups_[g];
    std::uint64_t row = 0;
    for (const auto& band : group.from) row += band.stride;
    for (const auto& band : group.to) row += band.stride;
    const auto step = std::max<std::uint64_t>(1, kUnit / row);
    for (std::uint64_t at = 0; at < static_cast<std::uint64_t>(group.rows); at += step)
      units_.push_back({Unit::Kind::Rows, g, at, std::min<std::uint64_t>(group.rows, at + step), group.to[0].stream,
                        group.to[0].start + at * group.to[0].stride});
  }

  // --- carrying out -------------------------------------------------------------------------------------------------

  void carry_out(const Unit& unit, Buffers& buffers) {
    refuse_stopped(budget_.stop);
    switch (unit.kind) {
      case Unit::Kind::Contiguous: return contiguous(plan_.copies[unit.index], unit.begin, unit.end, buffers);
      case Unit::Kind::Rows: return rows(groups_[unit.index], unit.begin, unit.end, buffers);
      case Unit::Kind::Tiles: return tiles(plan_.copies[unit.index], unit.begin, unit.end, buffers);
      case Unit::Kind::Compare:
        differences_[unit.index] = compare_places(source_, plan_.comparisons[unit.index], block_, buffers);
        return told(plan_.comparisons[unit.index].copy.bytes());
    }
  }

  void told(std::uint64_t bytes) {
    const auto done = done_ += bytes;
    if (tell_) tell_(done, all_);
  }

  void contiguous(const Copy& copy, std::uint64_t begin, std::uint64_t end, Buffers& buffers) {
    const bool summed = target_.summed(copy.to_stream), known = source_.summed(copy.from_stream);
    if (!summed && !known && !counting_ && end - begin >= kKernelRun) begin += in_kernel(copy, begin, end);
    for (auto at = begin; at < end; at += block_) {
      const auto block = Buffers::need(buffers.a, std::min(block_, end - at));
      source_.read(copy.from_stream, copy.from + at, block);
      if (summed || known) {
        const auto crc = kernels_.crc32(block);
        if (known) source_.add_sum(copy.from_stream, copy.from + at, block.size(), crc);
        if (summed) target_.add_sum(copy.to_stream, copy.to + at, block.size(), crc);
      }
      target_.write(copy.to_stream, copy.to + at, block);
      told(block.size());
    }
  }

  std::uint64_t in_kernel(const Copy& copy, std::uint64_t begin, std::uint64_t end) {
    const auto moved = kernel_copy(from_, to_, copy, begin, end);
    in_kernel_ += moved;
    target_.add_written(moved);
    told(moved);
    return moved;
  }

  /// Reads rows [begin, end) of a band; the row pitch in memory comes back.
  std::uint64_t read_band(const Band& band, std::uint64_t begin, std::uint64_t end, Bytes into) {
    const auto count = end - begin, first = band.start + begin * band.stride;
    const bool known = source_.summed(band.stream);
    if (band.width == band.stride) {
      const auto block = into.first(count * band.stride);
      source_.read(band.stream, first, block);
      if (known) source_.add_sum(band.stream, first, block);
      return band.stride;
    }
    const bool apart = band.width >= 4096 || band.stride > 4 * band.width;
    if (!apart) source_.read(band.stream, first, into.first((count - 1) * band.stride + band.width));
    const auto pitch = apart ? band.width : band.stride;
    for (std::uint64_t row = 0; row < count; ++row) {
      const auto bytes = into.subspan(row * pitch, band.width);
      if (apart) source_.read(band.stream, first + row * band.stride, bytes);
      if (known && band.width >= kShortRun) source_.add_sum(band.stream, first + row * band.stride, bytes);
    }
    return pitch;
  }

  void write_band(const Band& band, std::uint64_t begin, std::uint64_t end, std::span<const std::byte> from) {
    if (counting_) return target_.add_written((end - begin) * band.width);
    const bool summed = target_.summed(band.stream);
    const auto put = [&](std::uint64_t offset, std::span<const std::byte> bytes) {
      if (summed && bytes.size() >= kShortRun)
        target_.add_sum(band.stream, offset, bytes.size(), kernels_.crc32(bytes));
      target_.write(band.stream, offset, bytes);
    };
    if (band.width == band.stride) return put(band.start + begin * band.stride, from.first((end - begin) * band.stride));
    for (auto row = begin; row < end; ++row)
      put(band.start + row * band.stride, from.subspan((row - begin) * band.width, band.width));
  }

  void rows(const Group& group, std::uint64_t begin, std::uint64_t end, Buffers& buffers) {
    std::uint64_t from_row = 0, to_row = 0;
    for (const auto& band : group.from) from_row += band.stride;
    for (const auto& band : group.to) to_row += band.width;
    const auto at_once = std::max<std::uint64_t>(1, 2 * block_ / (from_row + to_row));
    std::vector<std::uint64_t> from_at(group.from.size()), pitch(group.from.size()), to_at(group.to.size());
    for (auto row = begin; row < end; row += at_once) {
      const auto last = std::min(end, row + at_once), count = last - row;
      const auto source = Buffers::need(buffers.a, count * from_row), target = Buffers::need(buffers.b, count * to_row);
      std::uint64_t at = 0;
      for (std::size_t i = 0; i < group.from.size(); ++i) {
        from_at[i] = at;
        pitch[i] = read_band(group.from[i], row, last, source.subspan(at, count * group.from[i].stride));
        at += count * group.from[i].stride;
      }
      at = 0;
      for (std::size_t i = 0; i < group.to.size(); ++i) to_at[i] = at, at += count * group.to[i].width;
      for (const auto& strip : group.strips)
        if (!counting_) strided_copy(target.data() + to_at[strip.to_band] + strip.to, source.data() + from_at[strip.from_band] + strip.from,
                     {{static_cast<Index>(count), static_cast<Index>(pitch[strip.from_band]),
                       static_cast<Index>(group.to[strip.to_band].width)}}, strip.run);
      for (std::size_t i = 0; i < group.to.size(); ++i)
        write_band(group.to[i], row, last, target.subspan(to_at[i], count * group.to[i].width));
      told(count * to_row);
    }
  }

  // --- tiles ----------------------------------------------------------------------------------------------------------

  void tiles(const Copy& copy, std::uint64_t begin, std::uint64_t end, Buffers& buffers) {
    const auto item = static_cast<Index>(size_of(copy.from_type)), wide = static_cast<Index>(size_of(copy.to_type));
    const auto dims = tile_dims(copy);
    for_each_tile(copy, dims, begin, end, block_, [&](const auto& extent, std::uint64_t from, std::uint64_t to) {
      auto bytes = source_.gather(copy.from_stream, from, end_runs(dims, extent, true, item), dims, extent, item, buffers.a, buffers.b);
      told(bytes.size());
      if (copy.from_type != copy.to_type) {
        const auto cast = Buffers::need(buffers.c, bytes.size() / static_cast<std::uint64_t>(item) * static_cast<std::uint64_t>(wide));
        kernels_.cast(bytes, copy.from_type, cast, copy.to_type);
        bytes = cast;
      }
      scatter(copy, to, end_runs(dims, extent, false, wide), bytes);
    });
  }

  void scatter(const Copy& copy, std::uint64_t base, const EndRuns& runs, std::span<const std::byte> bytes) {
    if (counting_) return target_.add_written(bytes.size());
    const bool summed = target_.summed(copy.to_stream) && runs.run >= kShortRun;
    for_each_run(runs, [&](std::uint64_t in_stream, std::uint64_t in_memory) {
      const auto run = bytes.subspan(in_memory, runs.run);
      if (summed) target_.add_sum(copy.to_stream, base + in_stream, runs.run, kernels_.crc32(run));
      target_.write(copy.to_stream, base + in_stream, run);
    });
  }

  const Plan& plan_;
  const Reader& from_;
  Writer& to_;
  const Kernels& kernels_;
  const Budget& budget_;
  const Progress& tell_;
  bool counting_;
  SummedSource source_;
  SummedTarget target_;
  std::vector<Buffers> buffers_;
  std::vector<Group> groups_;
  std::vector<Unit> units_;
  std::vector<Difference> differences_;
  std::uint64_t block_, all_ = 0;
  std::atomic<std::uint64_t> in_kernel_ = 0, done_ = 0;
  Report report_;
};

}  // namespace

Report execute(const Plan& plan, const Reader& from, Writer& to, const Kernels& kernels, const Budget& budget,
               const Progress& tell) {
  return Execution(plan, from, to, kernels, budget, tell).run();
}

namespace {

/// Where counted bytes go.
class Nowhere final : public Writer {
 public:
  explicit Nowhere(const Writer& like) : like_(like) {}
  const ShardedStateDict& describe() const override { return like_.describe(); }
  void write(std::uint32_t, std::uint64_t, std::span<const std::byte>) override {}
  void read(std::uint32_t, std::uint64_t, std::span<std::byte>) const override {}
  std::optional<FileRange> file_range(std::uint32_t) override { return std::nullopt; }
  void commit(std::span<const std::optional<std::uint32_t>>, bool) override {}

 private:
  const Writer& like_;
};

}  // namespace

Report measure(const Plan& plan, const Reader& from, const Writer& to, const Budget& budget) {
  const Kernels none{[](std::span<const std::byte>) { return std::uint32_t{0}; }, [](std::uint32_t, std::uint32_t, std::uint64_t) { return std::uint32_t{0}; },
                     [](std::span<const std::byte>, DType, std::span<std::byte>, DType) {}};
  const Progress silent;
  Nowhere nowhere(to);
  auto out = Execution(plan, from, nowhere, none, budget, silent, true).run();
  out.findings.clear();  // nothing was summed
  return out;
}

}  // namespace shard
