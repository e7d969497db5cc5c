// Two steps: blocks leave their parts, one block joins them in order, so that sums are the same from run to run.
#include "gpu/ops/look.h"

#include "gpu/ops/numbers.h"
#include "lm/digest.h"

#include <algorithm>

namespace gpu {
namespace {

using Index = std::int64_t;
constexpr unsigned kBlocks = 512;
constexpr int kGroup = lm::kDigestGroup;  // elements that a thread takes at once

/// What a thread, a block and the whole see, of weights and of activations alike.
struct Seen {
  double squares;
  unsigned long long nonfinite, digest;
  unsigned most, differs;  ///< bits of the largest magnitude; not 0 where an element differs from the first

  GPU_CODE void join(const Seen& other) {
    squares += other.squares;
    nonfinite += other.nonfinite;
    digest += other.digest;
    most = other.most > most ? other.most : most;
    differs |= other.differs;
  }
};
/// What the threads of a block see, each, becomes what the block sees.
template <bool kWeight, typename Block>
GPU_CODE void join_block(Block& block) {
  block.sum(&Seen::squares);
  block.sum(&Seen::nonfinite);
  block.max(&Seen::most);
  if constexpr (kWeight) block.max(&Seen::differs);
  else block.sum(&Seen::digest);
}

/// kWeight: the largest magnitude and the squares are those of all elements; else of the finite ones. kPacks: rows are whole groups, aligned.
template <typename T, bool kWeight, bool kPacks>
struct Look {
  static constexpr unsigned kThreads = 256;
  static constexpr int kEach = 4;  // groups whose reads are under way at once
  struct Shared {};
  using Own = Seen;
  struct Group {
    T item[kGroup];
  };
  const T* x;
  Seen* parts;
  Index rows, columns, stride, groups, blocks;  ///< `groups`: of a row

  GPU_CODE Index row_of(Index number) const { return rows == 1 ? 0 : number / groups; }
  GPU_CODE Group load(Index number) const {
    const auto row = row_of(number), column = (number - row * groups) * kGroup;
    const auto* from = x + row * stride + column;
    Group out{};
    if constexpr (kPacks) {
      constexpr int n = kPack<T>;
      GPU_UNROLL
      for (int i = 0; i < kGroup; i += n) {
        const auto pack = load_pack<n>(from + i);
        for (int j = 0; j < n; ++j) out.item[i + j] = pack.item[j];
      }
    } else {
      GPU_UNROLL
      for (int j = 0; j < kGroup; ++j)
        if (column + j < columns) out.item[j] = from[j];
    }
    return out;
  }
  GPU_CODE void look(const Group& group, Index number, std::uint32_t first, Seen& seen) const {
    const auto count = kPacks ? kGroup : columns - (number - row_of(number) * groups) * kGroup;
    float squares = 0;
    unsigned nonfinite = 0;
    std::uint64_t sum = 0;
    GPU_UNROLL
    for (int j = 0; j < kGroup; ++j) {
      if (j >= count) break;
      const float value = widen(group.item[j]);
      const auto bits = as_bits(value), magnitude = bits & 0x7fffffffu;
      const bool counts = magnitude < 0x7f800000u;
      nonfinite += !counts;
      if (kWeight || counts) {
        seen.most = magnitude > seen.most ? magnitude : seen.most;
        squares += value * value;
      }
      if (kWeight) seen.differs |= bits ^ first;
      else sum += bits * lm::digest_factor(j);
    }
    seen.squares += static_cast<double>(squares);
    seen.nonfinite += nonfinite;
    if (!kWeight) seen.digest += lm::group_digest(sum, static_cast<std::uint64_t>(number));
  }

  template <typename Block>
  GPU_CODE void operator()(Block& block) const {
    block.each_apart([&](unsigned thread, Seen& seen) {
      seen = {};
      const auto first = as_bits(widen(x[0]));
      const auto step = blocks * kThreads, end = rows * groups;
      for (auto number = static_cast<Index>(block.x()) * kThreads + thread; number < end; number += kEach * step) {
        Group held[kEach]{};
        GPU_UNROLL
        for (int i = 0; i < kEach; ++i)
          if (number + i * step < end) held[i] = load(number + i * step);
        GPU_UNROLL
        for (int i = 0; i < kEach; ++i)
          if (number + i * step < end) look(held[i], number + i * step, first, seen);
      }
    });
    join_block<kWeight>(block);
    block.each_apart([&](unsigned thread, Seen& seen) {
      if (thread == 0) parts[block.x()] = seen;
    });
  }
};

template <bool kWeight>
struct Join {
  static constexpr unsigned kThreads = 256;
  struct Shared {};
  using Own = Seen;
  const Seen* parts;
  WeightLook* weight;
  ActivationLook* activation;
  unsigned count;

  template <typename Block>
  GPU_CODE void operator()(Block& block) const {
    block.each_apart([&](unsigned thread, Seen& seen) {
      seen = {};
      for (auto i = thread; i < count; i += kThreads) seen.join(parts[i]);
    });
    join_block<kWeight>(block);
    block.each_apart([&](unsigned thread, Seen& all) {
      if (thread) return;
      if (kWeight) *weight = {all.squares, as_float(all.most), all.nonfinite ? 1u : 0u, all.differs ? 0u : 1u, 0};
      else *activation = {all.squares, all.nonfinite, all.digest, as_float(all.most), 0};
    });
  }
};

template <bool kWeight>
void start(StreamView on, const View& x, std::byte* scratch, WeightLook* weight, ActivationLook* activation) {
  auto* const parts = reinterpret_cast<Seen*>(scratch);
  unsigned blocks = 0;
  if (x.rows * x.columns > 0)
    with_activation_type(x.type, [&]<typename T>(T) {
      const bool whole = x.stride == x.columns && x.columns % kGroup == 0;  // one long row has the same groups
      const auto rows = whole ? 1 : x.rows, columns = whole ? x.rows * x.columns : x.columns, groups = (columns + kGroup - 1) / kGroup;
      const auto run = [&]<bool kPacks>() {
        using Kernel = Look<T, kWeight, kPacks>;
        blocks = static_cast<unsigned>(std::min<std::uint64_t>(kBlocks, blocks_for(static_cast<std::uint64_t>(rows * groups), Kernel::kThreads)));
        launch(on, {blocks}, Kernel{elements<const T>(x), parts, rows, columns, x.stride, groups, static_cast<Index>(blocks)});
      };
      x.columns % kGroup == 0 && in_packs(x, kPack<T>) ? run.template operator()<true>() : run.template operator()<false>();
    });
  launch(on, {1}, Join<kWeight>{parts, weight, activation, blocks});
}

}  // namespace

void look_at_weight(StreamView on, const View& weight, std::byte* scratch, WeightLook* out) { start<true>(on, weight, scratch, out, nullptr); }
void look_at_activation(StreamView on, const View& x, std::byte* scratch, ActivationLook* out) { start<false>(on, x, scratch, nullptr, out); }
std::size_t look_scratch_bytes() { return kBlocks * sizeof(Seen); }

}  // namespace gpu
