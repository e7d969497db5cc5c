// Checkpoints of a few tensors whose shards are cut and placed at random, for property tests of executors.
#pragma once

#include "tests/libshard/memory_checkpoint.h"

#include <algorithm>
#include <numeric>

namespace testing {

/// Cuts [0, shape) into boxes at random and places each in a stream of its own or behind others, in random axis order.
inline shard::ShardedTensor random_tensor(const std::string& key, shard::DType dtype, const shard::Shape& shape, std::mt19937& random, std::vector<shard::Stream>& streams) {
  shard::ShardedTensor out{key, dtype, shape, shape, {}, false};
  std::vector<shard::Box> boxes{shard::whole(shape)};
  for (int cuts = static_cast<int>(random() % 5); cuts > 0; --cuts) {
    const auto at = random() % boxes.size();
    const auto d = random() % shape.size();
    auto& box = boxes[at];
    if (box.size[d] < 2) continue;
    const auto keep = 1 + static_cast<shard::Index>(random() % static_cast<std::uint64_t>(box.size[d] - 1));
    auto other = box;
    other.lo[d] += keep;
    other.size[d] -= keep;
    box.size[d] = keep;
    boxes.push_back(other);
  }
  for (const auto& box : boxes) {
    if (streams.empty() || random() % 2) streams.push_back({0, 0, random() % 7, std::nullopt, random() % 2 == 0});
    auto& stream = streams.back();
    std::vector<std::size_t> order(shape.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    if (random() % 3 == 0) std::shuffle(order.begin(), order.end(), random);
    shard::Shape stride(shape.size());
    auto step = static_cast<shard::Index>(size_of(dtype));
    for (auto i = order.size(); i-- > 0;) {
      stride[order[i]] = step;
      step *= box.size[order[i]];
    }
    out.shards.push_back({box, {static_cast<std::uint32_t>(streams.size() - 1), stream.size, stride}, {}});
    stream.size += static_cast<std::uint64_t>(step) + random() % 3;
  }
  return out;
}

inline shard::ShardedStateDict random_dict(std::mt19937& random, bool summed) {
  shard::ShardedStateDict out;
  out.files = {"file"};
  const std::pair<const char*, shard::Shape> shapes[] = {{"a", {37, 64}}, {"b", {5, 3, 8, 16}}, {"c", {1}}, {"d", {130, 1025}}, {"e", {2, 999}}, {"f", {7, 1, 300}}};
  for (const auto& [key, shape] : shapes) out.tensors[key] = random_tensor(key, key[0] == 'b' ? shard::DType::F32 : key[0] == 'e' ? shard::DType::U8 : shard::DType::BF16, shape, random, out.streams);
  if (!summed)
    for (auto& stream : out.streams) stream.summed = false;
  return out;
}

}  // namespace testing
