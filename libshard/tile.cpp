// Integer arithmetic of tiles; no bytes are touched here.
#include "libshard/tile.h"

#include <algorithm>
#include <numeric>

namespace shard {

std::vector<TileDim> tile_dims(const Copy& copy) {
  const auto item = static_cast<Index>(size_of(copy.from_type)), wide = static_cast<Index>(size_of(copy.to_type));
  std::vector<TileDim> out;
  for (const auto& step : copy.steps) out.push_back({step.count, step.from, step.to});
  if (const auto run = static_cast<Index>(copy.run) / item; run > 1 || out.empty()) out.push_back({run, item, wide});
  return out;
}

std::vector<Index> tile_extent(const std::vector<TileDim>& dims, Index elements) {
  std::vector<Index> extent;
  for (const auto& dim : dims) extent.push_back(dim.count);
  const auto target_inner = dims.size() - 1;
  std::size_t source_inner = target_inner;
  for (std::size_t d = 0; d < dims.size(); ++d)
    if (dims[d].from > 0 && (dims[source_inner].from <= 0 || dims[d].from < dims[source_inner].from)) source_inner = d;
  const auto volume = [&] { return std::accumulate(extent.begin(), extent.end(), Index{1}, std::multiplies<>()); };
  for (std::size_t d = 0; d < dims.size(); ++d)  // outer dimensions go first: they are not contiguous anywhere
    while (d != source_inner && d != target_inner && extent[d] > 1 && volume() > elements) extent[d] = (extent[d] + 1) / 2;
  while (volume() > elements) {
    auto& longer = extent[source_inner] > extent[target_inner] ? extent[source_inner] : extent[target_inner];
    if (longer <= 1) break;
    longer = (longer + 1) / 2;
  }
  return extent;
}

std::uint64_t target_offset(const std::vector<TileDim>& dims, const std::vector<Index>& extent, std::uint64_t packed) {
  std::uint64_t out = 0;
  for (auto d = dims.size(); d-- > 0; packed /= static_cast<std::uint64_t>(extent[d]))
    out += packed % static_cast<std::uint64_t>(extent[d]) * static_cast<std::uint64_t>(dims[d].to);
  return out;
}

EndRuns end_runs(const std::vector<TileDim>& dims, const std::vector<Index>& extent, bool source, Index item) {
  const auto stride = [&](std::size_t d) { return source ? dims[d].from : dims[d].to; };
  std::vector<std::size_t> order;
  for (std::size_t d = 0; d < dims.size(); ++d)
    if (stride(d) != 0 && extent[d] > 1) order.push_back(d);
  std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return stride(a) > stride(b); });
  EndRuns out{static_cast<std::uint64_t>(item), {}, 0, {}, std::vector<Index>(dims.size(), 0)};
  for (std::size_t d = 0; d < dims.size(); ++d) out.strides.push_back(stride(d));
  Index packed = item;
  for (auto at = order.size(); at-- > 0;) {
    const auto d = order[at];
    out.packed[d] = packed;
    if (out.outer.empty() && stride(d) == static_cast<Index>(out.run)) out.run *= static_cast<std::uint64_t>(extent[d]);
    else out.outer.insert(out.outer.begin(), {extent[d], stride(d), packed});
    packed *= extent[d];
  }
  out.span = out.run;
  for (const auto& step : out.outer) out.span += static_cast<std::uint64_t>((step.count - 1) * step.from);
  return out;
}

}  // namespace shard
