// Runs: units of up to 16 bytes, neighbouring threads at neighbouring units of the target. Casts: the same, 16 bytes of the wider type.
// Tiles: where the fast dimensions of the two ends differ, through shared memory, so that both are read and written along their own.
#include "gpu/reshard/box_kernels.h"

#include "gpu/kernel.h"
#include "gpu/reshard/elements.h"

namespace gpu::reshard {
namespace {

using shard::DType;

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

struct Casts {
  static constexpr unsigned kThreads = kBlockThreads, kTogether = 5, kEach = 2;  // units whose reads are under way at once
  struct Shared {};
  struct Own {};
  Launch boxes;

  /// Units of kCount elements; `aligned`: to their bytes, or to 16 where they are more.
  template <DType kFrom, DType kTo, unsigned kCount>
  GPU_CODE void move(const BoxEntry& box, std::uint32_t first, bool aligned) const {
    using In = Bytes<kCount * size_in_kernel(kFrom)>;
    for (std::uint32_t turn = 0; turn < kUnitsPerBlock / kThreads; turn += kEach) {
      In held[kEach]{};
      std::uint64_t to[kEach];
      GPU_UNROLL
      for (unsigned i = 0; i < kEach; ++i)
        if (const auto at = first + (turn + i) * kThreads; at < box.units) {
          const auto place = places(box, at, box.dims);
          held[i] = aligned ? load_as<In>(boxes.from + place.from) : load_unaligned<In>(boxes.from + place.from);
          to[i] = place.to;
        }
      GPU_UNROLL
      for (unsigned i = 0; i < kEach; ++i)
        if (first + (turn + i) * kThreads < box.units) {
          const auto made = cast_elements<kFrom, kTo, kCount>(held[i]);
          if (aligned) store_as(boxes.to + to[i], made);
          else store_unaligned(boxes.to + to[i], made);
        }
    }
  }

  template <typename Block>
  GPU_CODE void operator()(Block& block) const {
    const auto& box = box_of(boxes, block.x());
    const auto first = (block.x() - box.first_block) * kUnitsPerBlock;
    block.each_apart([&](unsigned thread, Own&) {
      with_cast(box.from_type, box.to_type, [&]<DType kFrom, DType kTo>(Type<kFrom>, Type<kTo>) {
        constexpr auto count = cast_unit(size_in_kernel(kFrom), size_in_kernel(kTo));
        if (box.unit == count) move<kFrom, kTo, count>(box, first + thread, true);
        else move<kFrom, kTo, 1>(box, first + thread, box.unit != 0);
      });
    });
  }
};

/// Elements of the side of a square that a thread turns in its registers, so that the narrower end too moves four bytes at a time.
constexpr unsigned square_side(unsigned from_size, unsigned to_size) {
  const auto wider = from_size > to_size ? from_size : to_size, narrower = from_size + to_size - wider;
  unsigned side = 1;
  while (side * narrower < 4 && 2 * side * wider <= 16) side *= 2;
  return side;
}

struct Tiles {
  static constexpr unsigned kThreads = kBlockThreads;
  static constexpr unsigned kStrip = 16;  // tiles along the source that are in work together: its rows are read in pieces as long
  struct Shared {
    alignas(16) std::byte tile[16 << 10];
  };
  struct Own {};
  Launch boxes;

  /// A tile and its squares. Shared memory holds its rows along the target, a row's squares in an order (^) that spreads both reads
  /// and writes over all banks.
  template <DType kFrom, DType kTo, unsigned kSquare, typename Block>
  GPU_CODE void move(Block& block, const BoxEntry& box, const Places& place, std::uint32_t size_a, std::uint32_t size_b) const {
    constexpr unsigned kFromSize = size_in_kernel(kFrom), kToSize = size_in_kernel(kTo);
    using In = Bytes<kSquare * kFromSize>;
    using Out = Bytes<kSquare * kToSize>;
    constexpr unsigned kSide = tile_side(kFromSize, kToSize), kAcross = kSide / kSquare, kRows = kThreads / kAcross, kTurns = kAcross / kRows;
    constexpr unsigned kHeld = kTurns < 16 / kSquare ? kTurns : 16 / kSquare;  // squares whose reads are under way at once
    static_assert(kSide * kSide * kToSize <= sizeof(Shared));
    const unsigned a = box.dims - 2u, b = box.dims - 1u;
    auto* const shared = reinterpret_cast<Out*>(block.shared().tile);
    block.each([&](unsigned thread, Own&) {
      const auto i = thread % kAcross, first = thread / kAcross;
      const auto* from = boxes.from + place.from + i * sizeof(In);
      for (unsigned turn = 0; turn < kTurns; turn += kHeld) {
        In held[kHeld][kSquare]{};
        GPU_UNROLL
        for (unsigned t = 0; t < kHeld; ++t)
          if (const auto j = first + (turn + t) * kRows; i * kSquare < size_a && j * kSquare < size_b) {
            GPU_UNROLL
            for (unsigned row = 0; row < kSquare; ++row) held[t][row] = load_as<In>(from + std::uint64_t{j * kSquare + row} * box.from_stride[b]);
          }
        GPU_UNROLL
        for (unsigned t = 0; t < kHeld; ++t)
          if (const auto j = first + (turn + t) * kRows; i * kSquare < size_a && j * kSquare < size_b) {
            GPU_UNROLL
            for (unsigned column = 0; column < kSquare; ++column) {
              In turned{};
              GPU_UNROLL
              for (unsigned row = 0; row < kSquare; ++row) put_element<kFromSize>(turned, row, element<kFromSize>(held[t][row], column));
              shared[(i * kSquare + column) * kAcross + (j ^ i)] = cast_elements<kFrom, kTo, kSquare>(turned);
            }
          }
      }
    });
    block.each_apart([&](unsigned thread, Own&) {
      const auto j = thread % kAcross;
      auto* to = boxes.to + place.to + j * sizeof(Out);
      GPU_UNROLL
      for (unsigned i = thread / kAcross, turn = 0; turn < kSide / kRows; ++turn, i += kRows)
        if (i < size_a && j * kSquare < size_b) store_as(to + std::uint64_t{i} * box.to_stride[a], shared[i * kAcross + (j ^ i / kSquare)]);
    });
  }

  template <DType kFrom, DType kTo, typename Block>
  GPU_CODE void tile(Block& block, const BoxEntry& box) const {
    constexpr unsigned kFromSize = size_in_kernel(kFrom), kToSize = size_in_kernel(kTo), kSide = tile_side(kFromSize, kToSize), kSquare = square_side(kFromSize, kToSize);
    const unsigned a = box.dims - 2u, b = box.dims - 1u;  // along the source, along the target
    const auto across_a = (box.count[a] + kSide - 1) / kSide, across_b = (box.count[b] + kSide - 1) / kSide;
    const auto number = block.x() - box.first_block, plane = number / (across_a * across_b), in_plane = number % (across_a * across_b);
    const auto strip = in_plane / (kStrip * across_b) * kStrip, in_strip = in_plane - strip * across_b;
    const auto wide = across_a - strip < kStrip ? across_a - strip : kStrip;
    const auto first_a = (strip + in_strip % wide) * kSide, first_b = in_strip / wide * kSide;
    auto place = a == 0 ? Places{box.from, box.to} : places(box, plane, a);
    place.from += std::uint64_t{first_a} * box.from_stride[a] + std::uint64_t{first_b} * box.from_stride[b];
    place.to += std::uint64_t{first_a} * box.to_stride[a] + std::uint64_t{first_b} * box.to_stride[b];
    const auto size_a = box.count[a] - first_a, size_b = box.count[b] - first_b;  // beyond kSide is another block's
    const bool squares = (size_a | size_b) % kSquare == 0 && (place.from | box.from_stride[b]) % (kSquare * kFromSize) == 0 && (place.to | box.to_stride[a]) % (kSquare * kToSize) == 0;
    if (kSquare > 1 && squares) move<kFrom, kTo, kSquare>(block, box, place, size_a, size_b);
    else move<kFrom, kTo, 1>(block, box, place, size_a, size_b);
  }

  template <typename Block>
  GPU_CODE void operator()(Block& block) const {
    const auto& box = box_of(boxes, block.x());
    if (box.from_type != box.to_type)
      return with_cast(box.from_type, box.to_type, [&]<DType kFrom, DType kTo>(Type<kFrom>, Type<kTo>) { tile<kFrom, kTo>(block, box); });
    switch (box.unit) {
      case 8: return tile<DType::U64, DType::U64>(block, box);
      case 4: return tile<DType::U32, DType::U32>(block, box);
      case 2: return tile<DType::U16, DType::U16>(block, box);
      default: return tile<DType::U8, DType::U8>(block, box);
    }
  }
};

}  // namespace

void launch_runs(const Launch& boxes, std::uint64_t blocks, StreamView on) { launch(on, {blocks}, Runs{boxes}); }
void launch_casts(const Launch& boxes, std::uint64_t blocks, StreamView on) { launch(on, {blocks}, Casts{boxes}); }
void launch_tiles(const Launch& boxes, std::uint64_t blocks, StreamView on) { launch(on, {blocks}, Tiles{boxes}); }

}  // namespace gpu::reshard
