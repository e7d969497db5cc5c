// Reading computed weights by range: whole elements are computed in blocks, of the first and last only what was asked for.
#include "formats/hf/computed.h"

#include "libshard/error.h"
#include "libshard/numeric.h"

#include <algorithm>
#include <cstring>

namespace formats::hf {
namespace {

constexpr std::uint64_t kElements = 32 << 10;  // as floats they stay in the second cache

}  // namespace

void StoredBytes::read(std::uint64_t offset, std::span<std::byte> into) const {
  if (const auto* computed = pool->computed(file)) computed->read(begin + offset, into);
  else pool->get(file)->read(begin + offset, into);
}

StoredBytes bytes_of(const Checkpoint& checkpoint, const shard::ShardedTensor& tensor) {
  auto stride = shard::row_major(tensor.global_shape);
  for (auto& step : stride) step *= static_cast<shard::Index>(size_of(tensor.dtype));
  const bool one = tensor.shards.size() == 1 && tensor.shards[0].box.size == tensor.global_shape && tensor.shards[0].place.stride == stride;
  shard::require(one, shard::Code::BadFormat, [&] { return fmt::format("{}: lies in several pieces; what is computed from it needs it in one", tensor.key); });
  const auto& place = tensor.shards[0].place;
  const auto& stream = checkpoint.stored.streams[place.stream];
  const auto bytes = static_cast<std::uint64_t>(shard::volume(tensor.global_shape)) * size_of(tensor.dtype);
  shard::require(place.offset <= stream.size && bytes <= stream.size - place.offset, shard::Code::BadFormat, [&] { return fmt::format("{}: reaches past its file", tensor.key); });
  return {checkpoint.files.get(), stream.file, stream.offset + place.offset};
}

void ComputedElements::read(std::uint64_t offset, std::span<std::byte> into) const {
  shard::require(offset <= bytes() && into.size() <= bytes() - offset, shard::Code::BadFormat,
                 [&] { return fmt::format("bytes {}+{} reach past a computed tensor of {}", offset, into.size(), bytes()); });
  const std::uint64_t item = size_of(dtype_);
  std::vector<float> values(std::min<std::uint64_t>(kElements, into.size() / item + 2));
  std::vector<std::byte> edge;
  while (!into.empty()) {
    const auto first = offset / item, skip = offset % item;
    const auto count = std::min<std::uint64_t>(values.size(), (skip + into.size() + item - 1) / item);
    const auto floats = std::span(values).first(count);
    compute(first, floats);
    const auto size = std::min<std::uint64_t>(count * item - skip, into.size());
    if (size == count * item) {
      shard::cast(std::as_bytes(floats), shard::DType::F32, into.first(size), dtype_);
    } else {
      edge.resize(count * item);
      shard::cast(std::as_bytes(floats), shard::DType::F32, edge, dtype_);
      std::memcpy(into.data(), edge.data() + skip, size);
    }
    offset += size;
    into = into.subspan(size);
  }
}

void place(const Checkpoint& checkpoint, shard::ShardedStateDict& dict, shard::ShardedTensor tensor, std::shared_ptr<const ComputedElements> bytes,
           std::string file, shard::Shape stride) {
  for (auto& step : stride) step *= static_cast<shard::Index>(size_of(tensor.dtype));
  const auto size = bytes->bytes();
  const auto index = checkpoint.files->add(std::shared_ptr<const ComputedBytes>(std::move(bytes)));
  dict.files.resize(std::max<std::size_t>(dict.files.size(), index + 1));
  dict.files[index] = std::move(file);
  tensor.shards = {{shard::whole(tensor.global_shape), {static_cast<std::uint32_t>(dict.streams.size()), 0, std::move(stride)}, {}}};
  dict.streams.push_back({index, 0, size, std::nullopt, false});
  auto& slot = dict.tensors[tensor.key];
  slot = std::move(tensor);
}

}  // namespace formats::hf
