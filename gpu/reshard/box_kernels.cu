// Runs: units of up to 16 bytes, neighbouring threads at neighbouring units of the target. Casts: four elements a thread. Tiles: where
// the fast dimensions of the two ends differ, squares through shared memory, so that both are read and written along their own.
#include "gpu/reshard/box_kernels.h"

#include "gpu/kernel.h"
#include "gpu/reshard/elements.h"

namespace gpu::reshard {
namespace {

/// The box that a block works for.
GPU_CODE const BoxEntry& box_of(const Launch& boxes, unsigned block) {
  std::uint32_t low = 0, high = boxes.count;
  while (high - low > 1) {
    const auto middle = (low + high) / 2;
    if (boxes.entries[middle].first_block <= block) low = middle;
    else high = middle;
  }
  return boxes.entries[low];
}

struct Places {
  std::uint64_t from, to;
};

/// Where unit `at` of the first `dims` dimensions lies.
GPU_CODE Places places(const BoxEntry& box, std::uint32_t at, unsigned dims) {
  Places out{box.from, box.to};
  while (dims-- > 1) {
    const auto turns = box.by[dims].of(at), index = at - turns * box.count[dims];
    out.from += std::uint64_t{index} * box.from_stride[dims];
    out.to += std::uint64_t{index} * box.to_stride[dims];
    at = turns;
  }
  out.from += std::uint64_t{at} * box.from_stride[0];
  out.to += std::uint64_t{at} * box.to_stride[0];
  return out;
}

constexpr unsigned kBlockThreads = 256;

struct Runs {
  static constexpr unsigned kThreads = kBlockThreads, kEach = kUnitsPerBlock / kThreads;
  struct Shared {};
  struct Own {};
  Launch boxes;

  template <typename T>
  GPU_CODE void move(const BoxEntry& box, std::uint32_t first) const {
    T held[kEach];
    std::uint64_t to[kEach];
    GPU_UNROLL
    for (unsigned i = 0; i < kEach; ++i)  // all reads are under way before the first write waits for one
      if (const auto at = first + i * kThreads; at < box.units) {
        const auto place = places(box, at, box.dims);
        held[i] = load_as<T>(boxes.from + place.from);
        to[i] = place.to;
      }
    GPU_UNROLL
    for (unsigned i = 0; i < kEach; ++i)
      if (first + i * kThreads < box.units) store_as(boxes.to + to[i], held[i]);
  }

  template <typename Block>
  GPU_CODE void operator()(Block& block) const {
    const auto& box = box_of(boxes, block.x());
    const auto first = (block.x() - box.first_block) * kUnitsPerBlock;
    block.each_apart([&](unsigned thread, Own&) {
      switch (box.unit) {
        case 16: return move<Wide>(box, first + thread);
        case 8: return move<std::uint64_t>(box, first + thread);
        case 4: return move<std::uint32_t>(box, first + thread);
        case 2: return move<std::uint16_t>(box, first + thread);
        default: return move<std::uint8_t>(box, first + thread);
      }
    });
  }
};

GPU_CODE unsigned size_on_device(shard::DType type) {
  switch (type) {
    case shard::DType::F64: return 8;
    case shard::DType::F32: return 4;
    case shard::DType::F16:
    case shard::DType::BF16: return 2;
    default: return 1;
  }
}

struct Casts {
  static constexpr unsigned kThreads = kBlockThreads, kEach = 2;
  struct Shared {};
  struct Own {};
  Launch boxes;

  GPU_CODE void fours(const BoxEntry& box, std::uint32_t first) const {
    const auto size = size_on_device(box.from_type), wide = size_on_device(box.to_type);
    for (std::uint32_t turn = 0; turn < kUnitsPerBlock / kThreads; turn += kEach) {
      std::uint64_t held[kEach][kCastUnit], to[kEach];
      GPU_UNROLL
      for (unsigned i = 0; i < kEach; ++i)
        if (const auto at = first + (turn + i) * kThreads; at < box.units) {
          const auto place = places(box, at, box.dims);
          load_four(boxes.from + place.from, size, held[i]);
          to[i] = place.to;
        }
      GPU_UNROLL
      for (unsigned i = 0; i < kEach; ++i)
        if (first + (turn + i) * kThreads < box.units) {
          cast_elements(held[i], box.from_type, box.to_type);
          store_four(boxes.to + to[i], wide, held[i]);
        }
    }
  }
  GPU_CODE void ones(const BoxEntry& box, std::uint32_t first) const {
    const auto size = size_on_device(box.from_type), wide = size_on_device(box.to_type);
    for (std::uint32_t at = first, end = first + kUnitsPerBlock; at < end && at < box.units; at += kThreads) {
      const auto place = places(box, at, box.dims);
      std::uint64_t bits[1] = {load_bits(boxes.from + place.from, size, box.unit != 0)};
      cast_elements(bits, box.from_type, box.to_type);
      store_bits(boxes.to + place.to, wide, box.unit != 0, bits[0]);
    }
  }

  template <typename Block>
  GPU_CODE void operator()(Block& block) const {
    const auto& box = box_of(boxes, block.x());
    const auto first = (block.x() - box.first_block) * kUnitsPerBlock;
    block.each_apart([&](unsigned thread, Own&) {
      if (box.unit == kCastUnit) fours(box, first + thread);
      else ones(box, first + thread);
    });
  }
};

struct Tiles {
  static constexpr unsigned kThreads = kBlockThreads, kRows = kThreads / kTile, kPitch = kTile + 1;  // the pitch spreads columns over banks
  struct Shared {
    alignas(16) std::byte tile[kTile * kPitch * sizeof(std::uint64_t)];
  };
  struct Own {};
  Launch boxes;

  template <typename T, typename Block>
  GPU_CODE void move(Block& block, const BoxEntry& box) const {
    const unsigned a = box.dims - 2u, b = box.dims - 1u;  // along the source, along the target
    const auto across_a = (box.count[a] + kTile - 1) / kTile, across_b = (box.count[b] + kTile - 1) / kTile;
    auto tile = block.x() - box.first_block;
    const auto first_b = tile % across_b * kTile;
    tile /= across_b;
    const auto first_a = tile % across_a * kTile;
    auto place = a == 0 ? Places{box.from, box.to} : places(box, tile / across_a, a);
    place.from += std::uint64_t{first_a} * box.from_stride[a] + std::uint64_t{first_b} * box.from_stride[b];
    place.to += std::uint64_t{first_a} * box.to_stride[a] + std::uint64_t{first_b} * box.to_stride[b];
    const auto size_a = box.count[a] - first_a, size_b = box.count[b] - first_b;  // beyond kTile is another block's
    const bool cast = box.from_type != box.to_type;
    const auto size = size_on_device(box.from_type);
    auto* const shared = reinterpret_cast<T*>(block.shared().tile);
    block.each([&](unsigned thread, Own&) {
      const auto i = thread % kTile;
      for (auto j = thread / kTile; j < kTile && i < size_a && j < size_b; j += kRows) {
        const auto* from = boxes.from + place.from + std::uint64_t{i} * box.from_stride[a] + std::uint64_t{j} * box.from_stride[b];
        if (!cast) {
          shared[j * kPitch + i] = load_as<T>(from);
          continue;
        }
        std::uint64_t bits[1] = {load_bits(from, size, true)};
        cast_elements(bits, box.from_type, box.to_type);
        shared[j * kPitch + i] = static_cast<T>(bits[0]);
      }
    });
    block.each_apart([&](unsigned thread, Own&) {
      const auto j = thread % kTile;
      for (auto i = thread / kTile; i < kTile && i < size_a && j < size_b; i += kRows)
        store_as(boxes.to + place.to + std::uint64_t{i} * box.to_stride[a] + std::uint64_t{j} * box.to_stride[b], shared[j * kPitch + i]);
    });
  }

  template <typename Block>
  GPU_CODE void operator()(Block& block) const {
    const auto& box = box_of(boxes, block.x());
    switch (box.from_type == box.to_type ? box.unit : size_on_device(box.to_type)) {
      case 8: return move<std::uint64_t>(block, box);
      case 4: return move<std::uint32_t>(block, box);
      case 2: return move<std::uint16_t>(block, box);
      default: return move<std::uint8_t>(block, box);
    }
  }
};

}  // namespace

void launch_runs(const Launch& boxes, std::uint64_t blocks, StreamView on) { launch(on, {blocks}, Runs{boxes}); }
void launch_casts(const Launch& boxes, std::uint64_t blocks, StreamView on) { launch(on, {blocks}, Casts{boxes}); }
void launch_tiles(const Launch& boxes, std::uint64_t blocks, StreamView on) { launch(on, {blocks}, Tiles{boxes}); }

}  // namespace gpu::reshard
