// A range is a few boxes; each is joined with the shards that meet it.
#include "libshard/range_reader.h"

#include "libshard/error.h"

#include <algorithm>

namespace shard {
namespace {

/// A copy whose target is row-major memory of `box`.
Copy to_memory(const Shard& shard, const Box& box, const Box& common, DType dtype) {
  const auto item = static_cast<Index>(size_of(dtype));
  Copy copy{0, shard.place.stream, 0, shard.place.offset, 0, {}, static_cast<std::uint64_t>(item), dtype, dtype};
  auto stride = row_major(box.size);
  Index from = 0, to = 0;
  for (std::size_t d = 0; d < common.lo.size(); ++d) {
    from += (common.lo[d] - shard.box.lo[d]) * shard.place.stride[d];
    to += (common.lo[d] - box.lo[d]) * stride[d] * item;
    copy.steps.push_back({common.size[d], shard.place.stride[d], stride[d] * item});
  }
  copy.from += static_cast<std::uint64_t>(from);
  copy.to = static_cast<std::uint64_t>(to);
  return copy;
}

/// The first shard of every distinct box, by place.
std::vector<const Shard*> main_shards(const ShardedTensor& tensor) {
  std::vector<const Shard*> out;
  for (const auto& shard : tensor.shards)
    if (!empty(shard.box)) out.push_back(&shard);
  std::stable_sort(out.begin(), out.end(), [](const Shard* a, const Shard* b) {
    return a->box.lo != b->box.lo ? a->box.lo < b->box.lo : a->box.size < b->box.size;
  });
  out.erase(std::unique(out.begin(), out.end(), [](const Shard* a, const Shard* b) { return a->box == b->box; }), out.end());
  return out;
}

/// Source strides descend: bytes in stream order are bytes in row-major order.
bool in_order(const std::vector<TileDim>& dims) {
  return std::is_sorted(dims.begin(), dims.end(), [](const TileDim& a, const TileDim& b) { return a.from > b.from; });
}

void place(std::span<const std::byte> packed, const std::vector<TileDim>& dims, Index item, std::span<std::byte> into) {
  std::vector<MemoryStep> steps(dims.size());
  Index from = item;
  for (auto d = dims.size(); d-- > 0; from *= dims[d].count) steps[d] = {dims[d].count, from, dims[d].to};
  auto run = static_cast<std::size_t>(item);
  while (!steps.empty() && steps.back().from == static_cast<Index>(run) && steps.back().to == static_cast<Index>(run)) {
    run *= static_cast<std::size_t>(steps.back().count);
    steps.pop_back();
  }
  strided_copy(into.data(), packed.data(), steps, run);
}

}  // namespace

RangeReader::RangeReader(SummedSource& source, const ShardedTensor& tensor) : source_(source), tensor_(tensor), shards_(main_shards(tensor)) {}

void RangeReader::read(Index lo, Index hi, std::span<std::byte> into, Buffers& buffers) const {
  const auto item = size_of(tensor_.dtype);
  for (const auto& box : flat_range(tensor_.global_shape, lo, hi)) {
    const auto bytes = static_cast<std::uint64_t>(volume(box.size)) * item;
    read_box(box, into.first(bytes), buffers);
    into = into.subspan(bytes);
  }
}

void RangeReader::read_box(const Box& box, std::span<std::byte> into, Buffers& buffers) const {
  const auto item = static_cast<Index>(size_of(tensor_.dtype));
  Index read = 0;
  for (const auto* shard : shards_) {
    const auto common = intersect(box, shard->box);
    if (!common) continue;
    read += volume(common->size);
    const auto copy = to_memory(*shard, box, *common, tensor_.dtype);
    std::vector<TileDim> dims;
    for (const auto& step : copy.steps)
      if (step.count > 1) dims.push_back({step.count, step.from, step.to});
    if (dims.empty()) dims.push_back({1, item, item});
    std::vector<Index> extent;
    for (const auto& dim : dims) extent.push_back(dim.count);
    const auto runs = end_runs(dims, extent, true, item);
    const bool dense = runs.outer.empty() && runs.run == static_cast<std::uint64_t>(volume(common->size) * item) && box == *common && in_order(dims);
    if (dense) {
      source_.read(copy.from_stream, copy.from, into);
      if (source_.summed(copy.from_stream)) source_.add_sum(copy.from_stream, copy.from, into);
      continue;
    }
    const auto packed = source_.gather(copy.from_stream, copy.from, runs, dims, extent, item, buffers.a, buffers.b);
    place(packed, dims, item, into.subspan(copy.to));
  }
  require(read == volume(box.size), Code::BadFormat,
          [&] { return fmt::format("{}: {} is not held by exactly one shard", tensor_.key, to_string(box)); });
}

}  // namespace shard
