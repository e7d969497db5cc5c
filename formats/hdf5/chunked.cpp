// Only fetching a chunk's stored bytes needs the library; threads unpack side by side.
#include "formats/hdf5/chunked.h"

#include "libshard/strided.h"

#include <algorithm>
#include <cstring>

namespace formats::hdf5 {
namespace {

using shard::Code;
using shard::Index;

constexpr std::uint64_t kCacheBytes = 64 << 20;

/// Calls visit(chunk numbers) for every chunk that a box meets.
template <typename Visit>
void for_each_chunk(const shard::Box& box, const shard::Shape& chunk, Visit&& visit) {
  const auto rank = chunk.size();
  std::vector<Index> first(rank), last(rank);
  for (std::size_t d = 0; d < rank; ++d) {
    first[d] = box.lo[d] / chunk[d];
    last[d] = (box.lo[d] + box.size[d] - 1) / chunk[d];
  }
  auto at = first;
  for (;;) {
    visit(at);
    auto d = rank;
    while (d-- > 0) {
      if (++at[d] <= last[d]) break;
      at[d] = first[d];
      if (d == 0) return;
    }
    if (rank == 0) return;
  }
}

}  // namespace

ChunkCache::Chunk ChunkCache::find(const Key& key) {
  const std::lock_guard lock(mutex_);
  const auto found = where_.find(key);
  if (found == where_.end()) return nullptr;
  recent_.splice(recent_.begin(), recent_, found->second);
  return found->second->second;
}

void ChunkCache::keep(const Key& key, Chunk chunk) {
  const std::lock_guard lock(mutex_);
  if (where_.contains(key)) return;
  bytes_ += chunk->size();
  recent_.emplace_front(key, std::move(chunk));
  where_[key] = recent_.begin();
  while (bytes_ > kCacheBytes && recent_.size() > 1) {
    bytes_ -= recent_.back().second->size();
    where_.erase(recent_.back().first);
    recent_.pop_back();
  }
}

ChunkedBytes::~ChunkedBytes() {
  const Library lock;
  dataset_ = Handle();
}

ChunkCache::Chunk ChunkedBytes::chunk_at(const std::vector<Index>& at) const {
  std::vector<hsize_t> offset(at.size());
  std::uint64_t number = 0, size = layout_.item;
  for (std::size_t d = 0; d < at.size(); ++d) {
    offset[d] = static_cast<hsize_t>(at[d] * layout_.chunk[d]);
    number = number * static_cast<std::uint64_t>((layout_.shape[d] + layout_.chunk[d] - 1) / layout_.chunk[d]) + static_cast<std::uint64_t>(at[d]);
    size *= static_cast<std::uint64_t>(layout_.chunk[d]);
  }
  const ChunkCache::Key key{number_, number};
  if (auto found = cache_->find(key)) return found;
  std::vector<std::byte> bytes;
  std::uint32_t mask = 0;
  {
    const Library lock;
    hsize_t stored = 0;
    unsigned mask_there = 0;
    haddr_t there = 0;
    // Of a chunk that was never written the library has no size; that there is none it tells by looking at all.
    const bool found = H5Dget_chunk_storage_size(dataset_, offset.data(), &stored) >= 0 ||
                       (H5Dget_chunk_info_by_coord(dataset_, offset.data(), &mask_there, &there, &stored) >= 0 && there == HADDR_UNDEF && stored == 0);
    shard::require(found, Code::BadFormat, [&] { return fmt::format("{}: chunk {} cannot be found", layout_.where, number); });
    shard::require(stored <= 2 * size + (1 << 20), Code::BadFormat, [&] { return fmt::format("{}: a chunk of {} bytes is stored in {}", layout_.where, size, stored); });
    bytes.resize(stored);
    if (stored > 0)
      shard::require(H5Dread_chunk(dataset_, H5P_DEFAULT, offset.data(), &mask, bytes.data()) >= 0, Code::BadFormat, [&] { return fmt::format("{}: chunk {} cannot be read", layout_.where, number); });
  }
  if (bytes.empty()) {
    bytes.resize(size);
    for (std::uint64_t i = 0; i < size; i += layout_.item) std::copy(layout_.fill.begin(), layout_.fill.end(), bytes.begin() + static_cast<std::ptrdiff_t>(i));
  } else {
    bytes = unpack(std::move(bytes), layout_.filters, mask, size, layout_.where);
    if (layout_.big_endian)
      for (std::uint64_t i = 0; i < size; i += layout_.item) std::reverse(bytes.begin() + static_cast<std::ptrdiff_t>(i), bytes.begin() + static_cast<std::ptrdiff_t>(i + layout_.item));
  }
  auto chunk = std::make_shared<const std::vector<std::byte>>(std::move(bytes));
  cache_->keep(key, chunk);
  return chunk;
}

void ChunkedBytes::read_box(const shard::Box& box, std::span<std::byte> into) const {
  const auto rank = box.lo.size();
  const auto item = static_cast<Index>(layout_.item);
  const auto in_chunk = shard::row_major(layout_.chunk), in_box = shard::row_major(box.size);
  for_each_chunk(box, layout_.chunk, [&](const std::vector<Index>& at) {
    const auto chunk = chunk_at(at);
    std::vector<shard::MemoryStep> steps;
    Index from = 0, to = 0;
    for (std::size_t d = 0; d < rank; ++d) {
      const auto begin = std::max(box.lo[d], at[d] * layout_.chunk[d]), end = std::min(box.lo[d] + box.size[d], (at[d] + 1) * layout_.chunk[d]);
      from += (begin - at[d] * layout_.chunk[d]) * in_chunk[d] * item;
      to += (begin - box.lo[d]) * in_box[d] * item;
      steps.push_back({end - begin, in_chunk[d] * item, in_box[d] * item});
    }
    auto run = static_cast<std::size_t>(item);
    while (!steps.empty() && (steps.back().count == 1 || (steps.back().from == static_cast<Index>(run) && steps.back().to == static_cast<Index>(run)))) {
      run *= static_cast<std::size_t>(steps.back().count);
      steps.pop_back();
    }
    shard::strided_copy(into.data() + to, chunk->data() + from, steps, run);
  });
}

void ChunkedBytes::read(std::uint64_t offset, std::span<std::byte> into) const {
  const auto item = layout_.item;
  const auto lo = offset / item, hi = (offset + into.size() + item - 1) / item;
  std::vector<std::byte> whole;
  auto out = into;
  const bool aligned = offset % item == 0 && into.size() % item == 0;
  if (!aligned) {
    whole.resize((hi - lo) * item);
    out = whole;
  }
  for (const auto& box : shard::flat_range(layout_.shape, static_cast<Index>(lo), static_cast<Index>(hi))) {
    const auto bytes = static_cast<std::size_t>(shard::volume(box.size)) * item;
    read_box(box, out.first(bytes));
    out = out.subspan(bytes);
  }
  if (!aligned) std::memcpy(into.data(), whole.data() + (offset - lo * item), into.size());
}

}  // namespace formats::hdf5
