// The CPU executor's ways – contiguous runs, rows of several files in step, tiles – as lists that a device takes at once.
#include "gpu/reshard/batches.h"

#include "libshard/element.h"
#include "libshard/error.h"
#include "libshard/source.h"

#include <algorithm>
#include <tuple>

namespace gpu::reshard {
namespace {

using shard::Band;
using shard::Copy;
using shard::EndRuns;
using shard::Index;
using shard::TileDim;

constexpr std::uint64_t kAlign = 256;
constexpr std::size_t kMostParts = 4096;  ///< segments and boxes of a batch

std::uint64_t aligned(std::uint64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

struct Images {
  std::uint64_t from, to;
};

/// Starts a piece: 256-aligned places in both images.
Images room(std::uint64_t image, std::uint64_t from, std::uint64_t to, Batch& open, const Full& full) {
  shard::require(from <= image && to <= image, shard::Code::Device, [&] { return fmt::format("device: a piece of {} bytes does not fit an image of {}", std::max(from, to), image); });
  const bool many = open.boxes.size() >= kMostParts || open.reads.size() >= kMostParts || open.writes.size() >= kMostParts;
  if (!open.empty() && (many || aligned(open.from_bytes) + from > image || aligned(open.to_bytes) + to > image)) full(open);
  const Images out{aligned(open.from_bytes), aligned(open.to_bytes)};
  open.from_bytes = out.from + from;
  open.to_bytes = out.to + to;
  return out;
}

/// How one end of a tile is read: its span at once, or run by run, packed.
struct Gather {
  bool at_once;
  std::uint64_t bytes;  ///< of the image
  const std::vector<Index>& strides(const EndRuns& runs) const { return at_once ? runs.strides : runs.packed; }
};

Gather gather_of(const EndRuns& runs, std::uint64_t most) {
  auto packed = runs.run;
  for (const auto& step : runs.outer) packed *= static_cast<std::uint64_t>(step.count);
  const bool short_runs = runs.run < 2048 && runs.span <= std::max<std::uint64_t>(16 * packed, 64 << 10);
  const bool at_once = runs.span <= most && (runs.span <= 2 * packed || short_runs);
  return {at_once, at_once ? runs.span : packed};
}

void add_reads(Batch& batch, std::uint32_t stream, std::uint64_t base, const EndRuns& runs, const Gather& how, std::uint64_t at) {
  if (how.at_once) batch.reads.push_back({stream, base, runs.span, at});
  shard::for_each_run(runs, [&](std::uint64_t in_stream, std::uint64_t in_memory) {
    const Segment run{stream, base + in_stream, runs.run, at + (how.at_once ? in_stream : in_memory)};
    if (!how.at_once) batch.reads.push_back(run);
    if (runs.run >= shard::kShortRun) batch.sums.push_back(run);
  });
}

std::vector<TileDim> box_dims(const std::vector<Index>& extent, const std::vector<Index>& from, const std::vector<Index>& to) {
  std::vector<TileDim> out;
  for (std::size_t d = 0; d < extent.size(); ++d) out.push_back({extent[d], from[d], to[d]});
  return out;
}

/// Strides of elements packed in the order of the dimensions.
std::vector<Index> packed_strides(const std::vector<Index>& extent, Index item) {
  std::vector<Index> out(extent.size());
  for (auto d = extent.size(); d-- > 0; item *= extent[d]) out[d] = item;
  return out;
}

std::uint64_t bytes_of(const std::vector<Index>& extent, Index item) {
  for (const auto count : extent) item *= count;
  return static_cast<std::uint64_t>(item);
}

std::uint64_t sum_of(const std::vector<Band>& bands, std::uint64_t Band::* field) {
  std::uint64_t out = 0;
  for (const auto& band : bands) out += band.*field;
  return out;
}

/// A strip of a group as the copy that it came from.
Copy copy_of(const shard::Group& group, const shard::Strip& strip) {
  const auto &from = group.from[strip.from_band], &to = group.to[strip.to_band];
  return {0, from.stream, to.stream, from.start + strip.from, to.start + strip.to,
          {{group.rows, static_cast<Index>(from.stride), static_cast<Index>(to.stride)}}, strip.run, shard::DType::U8, shard::DType::U8};
}

}  // namespace

Batches::Batches(const shard::Plan& plan, std::uint64_t image) : plan_(plan), image_(image / kAlign * kAlign), copies_(plan.copies) {
  std::vector<std::size_t> rest;
  auto groups = group_rows(plan.copies, rest);
  for (const auto i : rest) add_copy(i);
  for (auto& group : groups) {
    // Rows must fit, each band at its own place, and so must the boxes of one piece.
    const auto slack = kAlign * (group.from.size() + group.to.size());
    const bool fits = std::max(sum_of(group.from, &Band::stride), sum_of(group.to, &Band::width)) + slack <= image_ && group.strips.size() <= kMostParts;
    if (fits) {
      groups_.push_back(std::move(group));
      add_group(groups_.size() - 1);
      continue;
    }
    for (const auto& strip : group.strips) {
      copies_.push_back(copy_of(group, strip));
      add_copy(copies_.size() - 1);
    }
  }
  std::stable_sort(units_.begin(), units_.end(), [](const Unit& a, const Unit& b) { return std::tie(a.stream, a.offset) < std::tie(b.stream, b.offset); });
  for (std::size_t i = 0; i < plan.comparisons.size(); ++i)
    if (plan.comparisons[i].copy.bytes() > 0) units_.push_back({Unit::Kind::Compare, i, 0, 0, 0, 0});
}

void Batches::add_copy(std::size_t index) {
  const auto& copy = copies_[index];
  const auto step_bytes = 4 * shard::kUnit;
  if (copy.steps.empty() && copy.from_type == copy.to_type && copy.from_stream < shard::kMemoryStreams) {
    for (std::uint64_t at = 0; at < copy.run; at += step_bytes)
      units_.push_back({Unit::Kind::Contiguous, index, at, std::min(copy.run, at + step_bytes), copy.to_stream, copy.to + at});
    return;
  }
  const auto dims = tile_dims(copy);
  const auto turns = static_cast<std::uint64_t>(dims.front().count);
  const auto step = std::max<std::uint64_t>(1, step_bytes / std::max<std::uint64_t>(1, copy.bytes() / std::max<std::uint64_t>(1, turns)));
  for (std::uint64_t at = 0; at < turns; at += step)
    units_.push_back({Unit::Kind::Tiles, index, at, std::min(turns, at + step), copy.to_stream, copy.to + at * static_cast<std::uint64_t>(dims.front().to)});
}

void Batches::add_group(std::size_t index) {
  const auto& group = groups_[index];
  const auto rows = static_cast<std::uint64_t>(group.rows);
  const auto step = std::max<std::uint64_t>(1, 4 * shard::kUnit / (sum_of(group.from, &Band::stride) + sum_of(group.to, &Band::stride)));
  for (std::uint64_t at = 0; at < rows; at += step)
    units_.push_back({Unit::Kind::Rows, index, at, std::min(rows, at + step), group.to[0].stream, group.to[0].start + at * group.to[0].stride});
}

void Batches::expand(const Unit& unit, Batch& open, const Full& full) const {
  switch (unit.kind) {
    case Unit::Kind::Contiguous: return contiguous(unit, open, full);
    case Unit::Kind::Rows: return rows(unit, open, full);
    case Unit::Kind::Tiles: return tiles(copies_[unit.index], unit, open, full);
    case Unit::Kind::Compare: return compare(unit, open, full);
  }
}

void Batches::contiguous(const Unit& unit, Batch& open, const Full& full) const {
  const auto& copy = copies_[unit.index];
  for (auto at = unit.begin; at < unit.end;) {
    const auto bytes = std::min(image_, unit.end - at);
    const auto images = room(image_, bytes, 0, open, full);
    const Segment read{copy.from_stream, copy.from + at, bytes, images.from};
    open.reads.push_back(read);
    open.straight.push_back({read, copy.to_stream, copy.to + at});
    open.moved += bytes;
    at += bytes;
  }
}

void Batches::rows(const Unit& unit, Batch& open, const Full& full) const {
  const auto& group = groups_[unit.index];
  const auto slack = kAlign * std::max(group.from.size(), group.to.size());
  const auto row = std::max(sum_of(group.from, &Band::stride), sum_of(group.to, &Band::width));
  const auto at_once = std::max<std::uint64_t>(1, std::min((image_ - slack) / row, kMostParts / (group.from.size() + group.to.size())));
  for (auto first = unit.begin; first < unit.end; first += at_once) {
    const auto count = std::min(at_once, unit.end - first);
    std::vector<std::uint64_t> from_at, to_at, pitch;
    std::uint64_t from = 0, to = 0;
    const auto apart = [](const Band& band) { return band.width != band.stride && (band.width >= 4096 || band.stride > 4 * band.width); };
    for (const auto& band : group.from) {
      pitch.push_back(apart(band) ? band.width : band.stride);
      from_at.push_back(from);
      from = aligned(from + count * pitch.back());
    }
    for (const auto& band : group.to) {
      to_at.push_back(to);
      to = aligned(to + count * band.width);
    }
    const auto images = room(image_, from, to, open, full);
    for (std::size_t i = 0; i < group.from.size(); ++i) {
      const auto& band = group.from[i];
      const auto start = band.start + first * band.stride, at = images.from + from_at[i];
      if (band.width == band.stride) {
        open.reads.push_back({band.stream, start, count * band.stride, at});
        open.sums.push_back(open.reads.back());
        continue;
      }
      if (!apart(band)) open.reads.push_back({band.stream, start, (count - 1) * band.stride + band.width, at});
      for (std::uint64_t r = 0; r < count; ++r) {
        const Segment run{band.stream, start + r * band.stride, band.width, at + r * pitch[i]};
        if (apart(band)) open.reads.push_back(run);
        if (band.width >= shard::kShortRun) open.sums.push_back(run);
      }
    }
    for (const auto& strip : group.strips)
      open.boxes.add({images.from + from_at[strip.from_band] + strip.from, images.to + to_at[strip.to_band] + strip.to,
                      {{static_cast<Index>(count), static_cast<Index>(pitch[strip.from_band]), static_cast<Index>(group.to[strip.to_band].width)}, {static_cast<Index>(strip.run), 1, 1}},
                      shard::DType::U8, shard::DType::U8});
    for (std::size_t i = 0; i < group.to.size(); ++i) {
      const auto& band = group.to[i];
      const auto start = band.start + first * band.stride, at = images.to + to_at[i];
      if (band.width == band.stride) open.writes.push_back({band.stream, start, count * band.stride, at});
      else
        for (std::uint64_t r = 0; r < count; ++r) open.writes.push_back({band.stream, start + r * band.stride, band.width, at + r * band.width});
      open.moved += count * band.width;
    }
  }
}

void Batches::tiles(const Copy& copy, const Unit& unit, Batch& open, const Full& full) const {
  const auto item = static_cast<Index>(size_of(copy.from_type)), wide = static_cast<Index>(size_of(copy.to_type));
  const auto dims = tile_dims(copy);
  shard::for_each_tile(copy, dims, unit.begin, unit.end, image_, [&](const auto& extent, std::uint64_t from, std::uint64_t to) {
    const auto source = end_runs(dims, extent, true, item), target = end_runs(dims, extent, false, wide);
    const auto how = gather_of(source, image_);
    const auto images = room(image_, how.bytes, bytes_of(extent, wide), open, full);
    add_reads(open, copy.from_stream, from, source, how, images.from);
    open.boxes.add({images.from, images.to, box_dims(extent, how.strides(source), target.packed), copy.from_type, copy.to_type});
    shard::for_each_run(target, [&](std::uint64_t in_stream, std::uint64_t in_memory) { open.writes.push_back({copy.to_stream, to + in_stream, target.run, images.to + in_memory}); });
    open.moved += bytes_of(extent, item);
  });
}

void Batches::compare(const Unit& unit, Batch& open, const Full& full) const {
  const auto& copy = plan_.comparisons[unit.index].copy;
  const auto item = static_cast<Index>(size_of(copy.from_type));
  const auto dims = tile_dims(copy);
  std::uint64_t first = 0;
  shard::for_each_tile(copy, dims, 0, static_cast<std::uint64_t>(dims.front().count), (image_ - kAlign) / 2, [&](const auto& extent, std::uint64_t from, std::uint64_t to) {
    const auto bytes = bytes_of(extent, item), half = aligned(bytes), most = (image_ - kAlign) / 2;
    const auto a = end_runs(dims, extent, true, item), b = end_runs(dims, extent, false, item);
    const auto how_a = gather_of(a, most), how_b = gather_of(b, most);
    const auto second = aligned(how_a.bytes);
    const auto images = room(image_, second + how_b.bytes, half + bytes, open, full);
    const auto packed = packed_strides(extent, item);
    add_reads(open, copy.from_stream, from, a, how_a, images.from);
    add_reads(open, copy.to_stream, to, b, how_b, images.from + second);
    open.boxes.add({images.from, images.to, box_dims(extent, how_a.strides(a), packed), copy.from_type, copy.from_type});
    open.boxes.add({images.from + second, images.to + half, box_dims(extent, how_b.strides(b), packed), copy.from_type, copy.from_type});
    open.compared.push_back({unit.index, first, images.to, images.to + half, bytes, copy.from_type});
    open.moved += bytes;
    first += bytes / static_cast<std::uint64_t>(item);
  });
}

void expand(const shard::ScanTask& task, std::size_t number, std::uint64_t image, Batch& open, const Full& full) {
  const auto& [tensor, shard, begin, end] = task;
  const auto dtype = tensor->dtype;
  const bool counts = is_floating(shard::part_of(dtype));
  if (dense(*tensor, *shard)) {
    for (auto at = begin; at < end;) {
      const auto bytes = std::min(image / kAlign * kAlign, end - at);
      const auto images = room(image, bytes, 0, open, full);
      open.reads.push_back({shard->place.stream, shard->place.offset + at, bytes, images.from});
      open.sums.push_back(open.reads.back());
      if (counts) open.scanned.push_back({number, images.from, bytes, dtype, at, {}, {}});
      open.moved += bytes;
      at += bytes;
    }
    return;
  }
  const auto copy = in_place(*tensor, *shard);
  const auto item = static_cast<Index>(size_of(dtype));
  const auto dims = tile_dims(copy);
  shard::for_each_tile(copy, dims, 0, static_cast<std::uint64_t>(dims.front().count), image, [&](const auto& extent, std::uint64_t from, std::uint64_t to) {
    const auto source = end_runs(dims, extent, true, item);
    const auto how = gather_of(source, image);
    const auto images = room(image, how.bytes, bytes_of(extent, item), open, full);
    add_reads(open, copy.from_stream, from, source, how, images.from);
    open.moved += bytes_of(extent, item);
    if (!counts) return;
    open.boxes.add({images.from, images.to, box_dims(extent, how.strides(source), packed_strides(extent, item)), dtype, dtype});
    open.scanned.push_back({number, images.to, bytes_of(extent, item), dtype, to, dims, extent});
  });
}

}  // namespace gpu::reshard
