// Joins the shards that a range meets; a dense range is read in place, others through a packed tile.
#include "libshard/range_reader.h"

#include "libshard/error.h"
#include "libshard/strided.h"

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

/// The common part of a shard and a box, as dimensions and as runs of the shard's stream.
struct Piece {
  Copy copy;
  std::vector<TileDim> dims;
  std::vector<Index> extent;
  EndRuns runs;
  bool dense;  ///< all of the box, its bytes together and in row-major order
};

Piece piece_of(const Shard& shard, const Box& box, const Box& common, DType dtype) {
  const auto item = static_cast<Index>(size_of(dtype));
  Piece out{to_memory(shard, box, common, dtype), {}, {}, {}, false};
  for (const auto& step : out.copy.steps)
    if (step.count > 1) out.dims.push_back({step.count, step.from, step.to});
  if (out.dims.empty()) out.dims.push_back({1, item, item});
  for (const auto& dim : out.dims) out.extent.push_back(dim.count);
  out.runs = end_runs(out.dims, out.extent, true, item);
  out.dense = out.runs.outer.empty() && out.runs.run == static_cast<std::uint64_t>(volume(common.size) * item) && box == common && in_order(out.dims);
  return out;
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

std::optional<RangeReader::Run> RangeReader::dense(Index lo, Index hi) const {
  const auto boxes = flat_range(tensor_.global_shape, lo, hi);
  if (boxes.size() != 1) return std::nullopt;
  for (const auto* shard : shards_)
    if (const auto common = intersect(boxes[0], shard->box)) {
      const auto piece = piece_of(*shard, boxes[0], *common, tensor_.dtype);
      if (!piece.dense) return std::nullopt;
      return Run{piece.copy.from_stream, piece.copy.from, piece.runs.run};
    }
  return std::nullopt;
}

void RangeReader::read_box(const Box& box, std::span<std::byte> into, Buffers& buffers) const {
  const auto item = static_cast<Index>(size_of(tensor_.dtype));
  Index read = 0;
  for (const auto* shard : shards_) {
    const auto common = intersect(box, shard->box);
    if (!common) continue;
    read += volume(common->size);
    const auto [copy, dims, extent, runs, dense] = piece_of(*shard, box, *common, tensor_.dtype);
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
