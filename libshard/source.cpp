// Reads, sums and comparisons that every pass over a checkpoint shares.
#include "libshard/source.h"

#include "libshard/error.h"
#include "libshard/parallel.h"
#include "libshard/stop.h"

#include <algorithm>
#include <cstring>

namespace shard {

std::uint64_t block_size(const Budget& budget) {
  return std::clamp<std::uint64_t>(budget.memory / std::max(1u, budget.threads) / 8, 16 << 10, kBlock);
}

SummedSource::SummedSource(const Reader& from, const Kernels& kernels, const std::vector<std::vector<std::byte>>* memory, bool counting)
    : from_(from), kernels_(kernels), memory_(memory), streams_(from.describe().streams), sums_(streams_.size()), touched_(streams_.size()), counting_(counting) {}

void SummedSource::touch(std::uint32_t stream, const std::string& tensor) {
  if (stream < kMemoryStreams && !touched_[stream]) touched_[stream] = &tensor;
}

void SummedSource::read(std::uint32_t stream, std::uint64_t offset, std::span<std::byte> into) {
  if (stream < kMemoryStreams) {
    if (!counting_) from_.read(stream, offset, into);
    read_ += into.size();
  } else if (!counting_) {
    std::memcpy(into.data(), (*memory_)[stream - kMemoryStreams].data() + offset, into.size());
  }
}

std::string SummedSource::file_of(std::uint32_t stream) const {
  const auto& all = from_.describe();
  return all.files[all.streams[stream].file];
}

std::span<std::byte> SummedSource::gather(std::uint32_t stream, std::uint64_t base, const EndRuns& runs, const std::vector<TileDim>& dims,
                                          const std::vector<Index>& extent, Index item, std::vector<std::byte>& raw_buffer,
                                          std::vector<std::byte>& out) {
  auto packed = runs.run;
  for (const auto& step : runs.outer) packed *= static_cast<std::uint64_t>(step.count);
  const bool short_runs = runs.run < 2048 && runs.span <= std::min(std::max<std::uint64_t>(16 * packed, 64 << 10), kUnit);
  const bool at_once = runs.span <= 2 * packed || short_runs;
  const auto raw = Buffers::need(raw_buffer, at_once ? runs.span : packed);
  const bool known = summed(stream) && runs.run >= kShortRun;
  if (at_once) read(stream, base, raw);
  else if (counting_ && !known) read(stream, base, raw);  // as many bytes, in one piece
  if ((!at_once && !counting_) || known)
    for_each_run(runs, [&](std::uint64_t in_stream, std::uint64_t in_memory) {
      const auto bytes = raw.subspan(at_once ? in_stream : in_memory, runs.run);
      if (!at_once) read(stream, base + in_stream, bytes);
      if (known) add_sum(stream, base + in_stream, bytes);
    });
  Index to = item;
  std::vector<MemoryStep> steps(dims.size());
  for (auto d = dims.size(); d-- > 0; to *= extent[d]) steps[d] = {extent[d], at_once ? runs.strides[d] : runs.packed[d], to};
  const auto target = Buffers::need(out, static_cast<std::uint64_t>(to));
  if (counting_) return target;
  auto run = static_cast<std::size_t>(item);
  while (!steps.empty() && (steps.back().count == 1 || (steps.back().from == static_cast<Index>(run) && steps.back().to == static_cast<Index>(run)))) {
    run *= static_cast<std::size_t>(steps.back().count);
    steps.pop_back();
  }
  strided_copy(target.data(), raw.data(), steps, run);
  return target;
}

void SummedSource::finish(const Budget& budget, std::vector<Finding>& findings, const Progress& tell) {
  std::vector<std::uint32_t> streams;
  for (std::uint32_t s = 0; s < streams_.size(); ++s)
    if (touched_[s] && summed(s)) streams.push_back(s);
  std::uint64_t all = 0;
  for (const auto s : streams)
    for (const auto& gap : sums_[s].gaps(streams_[s].size)) all += gap.second;
  std::atomic<std::uint64_t> done = 0;
  std::vector<char> bad(streams.size());
  std::vector<Buffers> buffers(std::max(1u, budget.threads));
  run_tasks(streams.size(), budget.threads, [&](std::size_t i, unsigned worker) {
    const auto s = streams[i];
    for (auto [offset, length] : sums_[s].gaps(streams_[s].size))
      while (length > 0) {
        refuse_stopped(budget.stop);
        const auto block = Buffers::need(buffers[worker].a, std::min(kBlock, length));
        read(s, offset, block);
        add_sum(s, offset, block);
        offset += block.size();
        length -= block.size();
        if (tell) tell(done += block.size(), all);
      }
    bad[i] = sums_[s].whole() != *streams_[s].crc32;
  });
  for (std::size_t i = 0; i < streams.size(); ++i)
    if (bad[i])
      findings.push_back({"checksum", Finding::Severity::Error, *touched_[streams[i]],
                          fmt::format("{}: CRC-32 of the stored bytes is {:08x}; the file says {:08x}", file_of(streams[i]),
                                      sums_[streams[i]].whole(), *streams_[streams[i]].crc32)});
}

Difference compare_places(SummedSource& source, const Comparison& comparison, std::uint64_t block, Buffers& buffers) {
  const auto& copy = comparison.copy;
  Difference sum;
  if (copy.bytes() == 0) return sum;
  const auto item = static_cast<Index>(size_of(copy.from_type));
  const auto dims = tile_dims(copy);
  std::uint64_t done = 0;
  for_each_tile(copy, dims, 0, static_cast<std::uint64_t>(dims.front().count), block, [&](const auto& extent, std::uint64_t from, std::uint64_t to) {
    const auto a = source.gather(copy.from_stream, from, end_runs(dims, extent, true, item), dims, extent, item, buffers.a, buffers.b);
    const auto b = source.gather(copy.to_stream, to, end_runs(dims, extent, false, item), dims, extent, item, buffers.a, buffers.c);
    const auto difference = compare(a, b, copy.from_type);
    if (difference.count && !sum.count) sum.first = done + difference.first;
    sum.count += difference.count;
    sum.max_ulp = std::max(sum.max_ulp, difference.max_ulp);
    done += a.size() / static_cast<std::uint64_t>(item);
  });
  return sum;
}

Finding describe_difference(const SummedSource& source, const std::string& key, const Comparison& comparison, const Difference& difference) {
  const auto& tensor = source.reader().describe().tensors.at(key);
  const auto index = unravel(static_cast<Index>(difference.first), comparison.box.size);
  Index flat = 0;
  for (std::size_t d = 0; d < index.size(); ++d) flat = flat * tensor.global_shape[d] + comparison.box.lo[d] + index[d];
  return {comparison.tie ? "tie" : "replica", Finding::Severity::Error, key,
          fmt::format("the copies in {} and {} differ in {} element{}, first at {}, by up to {} ULP; they should be equal",
                      source.file_of(comparison.copy.from_stream), source.file_of(comparison.copy.to_stream), difference.count,
                      difference.count == 1 ? "" : "s", to_string(unravel(flat, tensor.natural)), difference.max_ulp)};
}

}  // namespace shard
