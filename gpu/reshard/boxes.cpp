// Which kernel moves a box, in units how large: integer arithmetic only.
#include "gpu/reshard/boxes.h"

#include "gpu/reshard/box_kernels.h"
#include "libshard/error.h"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace gpu::reshard {
namespace {

using shard::Index;
using shard::TileDim;
using Dims = std::vector<TileDim>;

/// The target's fastest dimension last, joined where both ends go on.
Dims in_target_order(Dims dims) {
  std::erase_if(dims, [](const TileDim& dim) { return dim.count == 1; });
  std::stable_sort(dims.begin(), dims.end(), [](const TileDim& a, const TileDim& b) { return a.to > b.to; });
  Dims out;
  for (const auto& dim : dims)
    if (!out.empty() && out.back().from == dim.from * dim.count && out.back().to == dim.to * dim.count) out.back() = {out.back().count * dim.count, dim.from, dim.to};
    else out.push_back(dim);
  return out;
}

std::uint64_t units_of(const Dims& dims) {
  return std::accumulate(dims.begin(), dims.end(), std::uint64_t{1}, [](std::uint64_t product, const TileDim& dim) { return product * static_cast<std::uint64_t>(dim.count); });
}

/// The largest power of two, at most `most`, that divides everything that is not 0.
std::uint32_t common_unit(std::uint32_t most, std::initializer_list<std::uint64_t> starts, const Dims& dims, Index TileDim::* only = nullptr) {
  std::uint64_t all = most;
  for (const auto start : starts) all |= start;
  for (const auto& dim : dims) {
    if (only != &TileDim::to) all |= static_cast<std::uint64_t>(dim.from);
    if (only != &TileDim::from) all |= static_cast<std::uint64_t>(dim.to);
  }
  return static_cast<std::uint32_t>(all & ~(all - 1));
}

/// The dimension, other than the last, along which the source's elements of `size` bytes lie together; -1: none.
int source_fastest(const Dims& dims, Index size) {
  for (std::size_t d = 0; d + 1 < dims.size(); ++d)
    if (dims[d].from == size) return static_cast<int>(d);
  return -1;
}

BoxEntry entry_of(const Box& box, const Dims& dims, std::uint32_t unit) {
  BoxEntry out{box.from, box.to, 0, static_cast<std::uint32_t>(units_of(dims)), {}, {}, {}, {}, static_cast<std::uint8_t>(dims.size()), static_cast<std::uint8_t>(unit), box.from_type, box.to_type};
  for (std::size_t d = 0; d < dims.size(); ++d) {
    shard::require(dims[d].from >= 0 && dims[d].to >= 0 && dims[d].from <= UINT32_MAX && dims[d].to <= UINT32_MAX, shard::Code::Device, [] { return "device: a box's stride is beyond its image"; });
    out.count[d] = static_cast<std::uint32_t>(dims[d].count);
    out.from_stride[d] = static_cast<std::uint32_t>(dims[d].from);
    out.to_stride[d] = static_cast<std::uint32_t>(dims[d].to);
    out.by[d] = Divisor(out.count[d]);
  }
  return out;
}

constexpr Index kWorthTiles = 4;  ///< shorter sides are moved element by element

bool worth_tiles(const Dims& dims, int source) { return source >= 0 && dims[static_cast<std::size_t>(source)].count >= kWorthTiles && dims.back().count >= kWorthTiles; }

/// The source's fastest dimension goes before the target's. How many tiles that makes.
std::uint64_t tile_order(Dims& dims, int source, std::uint64_t side) {
  std::rotate(dims.begin() + source, dims.begin() + source + 1, dims.end() - 1);
  const auto across = [&](Index count) { return (static_cast<std::uint64_t>(count) + side - 1) / side; };
  return units_of({dims.begin(), dims.end() - 2}) * across(dims[dims.size() - 2].count) * across(dims.back().count);
}

}  // namespace

void BoxList::add(const Box& box) {
  const auto elements = units_of(box.dims);
  if (elements == 0) return;
  const auto dims = in_target_order(box.dims);
  // A byte's dimension is still to come; more loops than a kernel knows are turned here.
  if (dims.size() >= BoxEntry::kDims) {
    for (Index i = 0; i < dims.front().count; ++i)
      add({box.from + static_cast<std::uint64_t>(i * dims.front().from), box.to + static_cast<std::uint64_t>(i * dims.front().to), {dims.begin() + 1, dims.end()}, box.from_type, box.to_type});
    return;
  }
  shard::require(elements * size_of(box.from_type) < std::uint64_t{1} << 31, shard::Code::Device, [] { return "device: a box of 2 GiB or more"; });
  if (box.from_type == box.to_type) add_copy({box.from, box.to, dims, box.from_type, box.to_type});
  else add_cast({box.from, box.to, dims, box.from_type, box.to_type});
}

void BoxList::add_copy(const Box& box) {
  auto dims = box.dims;
  dims.push_back({static_cast<Index>(size_of(box.from_type)), 1, 1});
  dims = in_target_order(std::move(dims));
  std::uint64_t run = 1;
  if (!dims.empty() && dims.back().from == 1 && dims.back().to == 1) {
    run = static_cast<std::uint64_t>(dims.back().count);
    dims.pop_back();
  }
  const auto unit = common_unit(16, {box.from, box.to, run}, dims);
  if (run > unit || dims.empty()) dims.push_back({static_cast<Index>(run / unit), unit, unit});
  const bool dense = dims.back().from == unit && dims.back().to == unit;
  const auto source = source_fastest(dims, unit);
  if (!dense && unit <= 8 && dims.back().to == unit && worth_tiles(dims, source)) {
    const auto blocks = tile_order(dims, source, tile_side(unit, unit));
    return push(tiles_, tile_blocks_, blocks, entry_of(box, dims, unit));
  }
  const auto entry = entry_of(box, dims, unit);
  push(runs_, run_blocks_, (entry.units + kUnitsPerBlock - 1) / kUnitsPerBlock, entry);
}

void BoxList::add_cast(const Box& box) {
  shard::require(shard::is_floating(box.from_type) && shard::is_floating(box.to_type), shard::Code::Mismatch,
                 [&] { return fmt::format("cannot cast {} to {}", name(box.from_type), name(box.to_type)); });
  auto dims = box.dims;
  const auto item = static_cast<Index>(size_of(box.from_type)), wide = static_cast<Index>(size_of(box.to_type));
  const auto aligned = [&](std::uint32_t group) {
    const auto from = std::min<std::uint32_t>(16, group * static_cast<std::uint32_t>(item)), to = std::min<std::uint32_t>(16, group * static_cast<std::uint32_t>(wide));
    return common_unit(from, {box.from}, dims, &TileDim::from) == from && common_unit(to, {box.to}, dims, &TileDim::to) == to;
  };
  const auto group = cast_unit(static_cast<unsigned>(item), static_cast<unsigned>(wide));
  if (!dims.empty() && dims.back().from == item && dims.back().to == wide && dims.back().count % group == 0) {
    auto grouped = dims;
    std::swap(dims, grouped);
    dims.back() = {dims.back().count / group, item * group, wide * group};
    if (aligned(group)) {
      const auto entry = entry_of(box, dims, group);
      return push(casts_, cast_blocks_, (entry.units + kUnitsPerBlock - 1) / kUnitsPerBlock, entry);
    }
    std::swap(dims, grouped);
  }
  const auto unit = aligned(1) ? 1u : 0u;  // 0: one element, byte by byte
  const auto source = source_fastest(dims, item);
  if (unit && !dims.empty() && dims.back().to == wide && dims.back().from != item && worth_tiles(dims, source)) {
    const auto blocks = tile_order(dims, source, tile_side(static_cast<unsigned>(item), static_cast<unsigned>(wide)));
    return push(tiles_, tile_blocks_, blocks, entry_of(box, dims, unit));
  }
  const auto entry = entry_of(box, dims, unit);
  push(casts_, cast_blocks_, (entry.units + kUnitsPerBlock - 1) / kUnitsPerBlock, entry);
}

void BoxList::push(std::vector<BoxEntry>& to, std::uint64_t& blocks, std::uint64_t more, BoxEntry entry) {
  entry.first_block = static_cast<std::uint32_t>(blocks);
  blocks += more;
  to.push_back(entry);
}

void BoxList::clear() { *this = {}; }

void BoxList::store(std::byte* table) const {
  for (const auto* entries : {&runs_, &casts_, &tiles_}) {
    if (!entries->empty()) std::memcpy(table, entries->data(), entries->size() * sizeof(BoxEntry));
    table += entries->size() * sizeof(BoxEntry);
  }
}

void BoxList::run(const std::byte* table, const std::byte* from, std::byte* to, StreamView on) const {
  const auto* entries = reinterpret_cast<const BoxEntry*>(table);
  const auto launch = [&](const std::vector<BoxEntry>& boxes, std::uint64_t blocks, auto start) {
    if (!boxes.empty()) start(Launch{entries, static_cast<std::uint32_t>(boxes.size()), from, to}, blocks, on);
    entries += boxes.size();
  };
  launch(runs_, run_blocks_, launch_runs);
  launch(casts_, cast_blocks_, launch_casts);
  launch(tiles_, tile_blocks_, launch_tiles);
}

}  // namespace gpu::reshard
