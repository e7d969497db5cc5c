// Checkpoints in memory, for tests of plans and their execution: streams are byte vectors with recorded sums.
#pragma once

#include "formats/kernels.h"
#include "libshard/checkpoint.h"

#include <cstring>
#include <random>

namespace testing {

class Memory final : public shard::Reader, public shard::Writer {
 public:
  explicit Memory(shard::ShardedStateDict dict) : dict_(std::move(dict)) {
    for (const auto& stream : dict_.streams) bytes_.emplace_back(stream.size);
  }
  const shard::ShardedStateDict& describe() const override { return dict_; }
  void read(std::uint32_t stream, std::uint64_t offset, std::span<std::byte> into) const override {
    std::memcpy(into.data(), bytes_.at(stream).data() + offset, into.size());
  }
  void write(std::uint32_t stream, std::uint64_t offset, std::span<const std::byte> from) override {
    if (offset + from.size() > bytes_.at(stream).size()) throw std::out_of_range("write");
    std::memcpy(bytes_[stream].data() + offset, from.data(), from.size());
  }
  std::optional<shard::FileRange> file_range(std::uint32_t) const override { return std::nullopt; }
  std::optional<shard::FileRange> file_range(std::uint32_t) override { return std::nullopt; }
  void commit(std::span<const std::optional<std::uint32_t>>, bool) override {}

  std::vector<std::vector<std::byte>>& bytes() { return bytes_; }
  /// Fills every stream with noise and records its sums.
  void fill(std::uint32_t seed) {
    std::mt19937 random(seed);
    for (std::size_t s = 0; s < bytes_.size(); ++s) {
      for (auto& byte : bytes_[s]) byte = static_cast<std::byte>(random());
      dict_.streams[s].crc32 = formats::kernels().crc32(bytes_[s]);
    }
  }
  /// The tensor's elements in row-major order.
  std::vector<std::byte> whole(const std::string& key) const {
    const auto& tensor = dict_.tensors.at(key);
    const auto item = size_of(tensor.dtype);
    const auto step = shard::row_major(tensor.global_shape);
    std::vector<std::byte> out(static_cast<std::size_t>(shard::volume(tensor.global_shape)) * item);
    for (const auto& shard : tensor.shards)
      for (shard::Index flat = 0; flat < shard::volume(shard.box.size); ++flat) {
        const auto at = shard::unravel(flat, shard.box.size);
        auto from = static_cast<std::int64_t>(shard.place.offset);
        shard::Index to = 0;
        for (std::size_t d = 0; d < at.size(); ++d) {
          from += at[d] * shard.place.stride[d];
          to += (at[d] + shard.box.lo[d]) * step[d];
        }
        std::memcpy(out.data() + static_cast<std::size_t>(to) * item, bytes_[shard.place.stream].data() + from, item);
      }
    return out;
  }

 private:
  shard::ShardedStateDict dict_;
  std::vector<std::vector<std::byte>> bytes_;
};

}  // namespace testing
