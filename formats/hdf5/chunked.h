// A chunked data set as one row of bytes: chunks are read, unpacked and kept for a while.
#pragma once

#include "formats/hdf5/chunk_filters.h"
#include "formats/hdf5/library.h"
#include "formats/local.h"
#include "libshard/box.h"

#include <list>
#include <map>
#include <memory>

namespace formats::hdf5 {

/// Unpacked chunks of one file, the least recently used forgotten first. Thread safe.
class ChunkCache {
 public:
  using Key = std::pair<std::uint64_t, std::uint64_t>;  ///< data set, chunk
  using Chunk = std::shared_ptr<const std::vector<std::byte>>;
  Chunk find(const Key& key);
  void keep(const Key& key, Chunk chunk);

 private:
  std::mutex mutex_;
  std::list<std::pair<Key, Chunk>> recent_;
  std::map<Key, std::list<std::pair<Key, Chunk>>::iterator> where_;
  std::uint64_t bytes_ = 0;
};

struct ChunkedLayout {
  shard::Shape shape, chunk;
  std::size_t item;
  bool big_endian;
  std::vector<Filter> filters;
  std::vector<std::byte> fill;   ///< one element, for chunks that were never written
  std::string where;
};

class ChunkedBytes final : public ComputedBytes {
 public:
  ChunkedBytes(Handle dataset, std::uint64_t number, ChunkedLayout layout, std::shared_ptr<ChunkCache> cache)
      : dataset_(std::move(dataset)), number_(number), layout_(std::move(layout)), cache_(std::move(cache)) {}
  ~ChunkedBytes() override;
  void read(std::uint64_t offset, std::span<std::byte> into) const override;

 private:
  ChunkCache::Chunk chunk_at(const std::vector<shard::Index>& at) const;
  void read_box(const shard::Box& box, std::span<std::byte> into) const;

  Handle dataset_;
  std::uint64_t number_;
  ChunkedLayout layout_;
  std::shared_ptr<ChunkCache> cache_;
};

}  // namespace formats::hdf5
