// Two steps: blocks leave their parts, one block joins them in order, so that sums are the same from run to run.
#include "gpu/ops/look.h"

#include "gpu/ops/numbers.h"

#include <algorithm>

namespace gpu {
namespace {

using Index = std::int64_t;
constexpr unsigned kBlocks = 512;

GPU_CODE std::uint64_t mix64(std::uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

/// What a thread, a block and the whole see, of weights and of activations alike.
struct Seen {
  double squares;
  unsigned long long nonfinite, digest;
  unsigned most, differs;  ///< bits of the largest magnitude; bits in which an element differs from the first

  GPU_CODE void join(const Seen& other) {
    squares += other.squares;
    nonfinite += other.nonfinite;
    digest += other.digest;
    most = other.most > most ? other.most : most;
    differs |= other.differs;
  }
};

/// kWeight: the largest magnitude and the squares are those of all elements; else of the finite ones.
template <typename T, bool kWeight, int N>
struct Look {
  static constexpr unsigned kThreads = 256;
  struct Shared {
    Seen part[kThreads];
  };
  struct Own {};
  const T* x;
  Seen* parts;
  Index rows, columns, stride, blocks;

  template <typename Block>
  GPU_CODE void operator()(Block& block) const {
    auto& s = block.shared();
    block.each([&](unsigned thread, Own&) {
      Seen seen{};
      const auto first = as_bits(widen(x[0]));
      const auto step = blocks * kThreads * N;
      for (auto i = (static_cast<Index>(block.x()) * kThreads + thread) * N; i < rows * columns; i += step) {
        const auto pack = load_pack<N>(stride == columns ? x + i : x + i / columns * stride + i % columns);
        float squares = 0;
        for (int j = 0; j < N; ++j) {
          const float value = widen(pack.item[j]);
          const auto bits = as_bits(value), magnitude = bits & 0x7fffffffu;
          const bool counts = magnitude < 0x7f800000u;
          seen.nonfinite += !counts;
          if (kWeight || counts) {
            seen.most = magnitude > seen.most ? magnitude : seen.most;
            squares += value * value;
          }
          if (kWeight) seen.differs |= bits ^ first;
          else seen.digest += mix64(bits + static_cast<std::uint64_t>(i + j) * 0x9E3779B97F4A7C15ull);
        }
        seen.squares += static_cast<double>(squares);
      }
      s.part[thread] = seen;
    });
    block.each([&](unsigned thread, Own&) {  // 256 → 16 → 1, always in the same order
      if (thread % 16 == 0)
        for (unsigned i = 1; i < 16; ++i) s.part[thread].join(s.part[thread + i]);
    });
    block.each([&](unsigned thread, Own&) {
      if (thread) return;
      for (unsigned i = 16; i < kThreads; i += 16) s.part[0].join(s.part[i]);
      parts[block.x()] = s.part[0];
    });
  }
};

template <bool kWeight>
struct Join {
  static constexpr unsigned kThreads = 32;
  struct Shared {
    Seen part[kThreads];
  };
  struct Own {};
  const Seen* parts;
  WeightLook* weight;
  ActivationLook* activation;
  unsigned count;

  template <typename Block>
  GPU_CODE void operator()(Block& block) const {
    auto& s = block.shared();
    block.each([&](unsigned thread, Own&) {
      Seen seen{};
      for (auto i = thread; i < count; i += kThreads) seen.join(parts[i]);
      s.part[thread] = seen;
    });
    block.each([&](unsigned thread, Own&) {
      if (thread) return;
      auto all = s.part[0];
      for (unsigned i = 1; i < kThreads; ++i) all.join(s.part[i]);
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
      const auto run = [&]<int N>() {
        using Kernel = Look<T, kWeight, N>;
        blocks =
            static_cast<unsigned>(std::min<std::uint64_t>(kBlocks, blocks_for(static_cast<std::uint64_t>(x.rows * x.columns), Kernel::kThreads * N)));
        launch(on, {blocks}, Kernel{elements<const T>(x), parts, x.rows, x.columns, x.stride, static_cast<Index>(blocks)});
      };
      constexpr int n = kPack<T>;
      in_packs(x, n) ? run.template operator()<n>() : run.template operator()<1>();
    });
  launch(on, {1}, Join<kWeight>{parts, weight, activation, blocks});
}

}  // namespace

void look_at_weight(StreamView on, const View& weight, std::byte* scratch, WeightLook* out) { start<true>(on, weight, scratch, out, nullptr); }
void look_at_activation(StreamView on, const View& x, std::byte* scratch, ActivationLook* out) { start<false>(on, x, scratch, nullptr, out); }
std::size_t look_scratch_bytes() { return kBlocks * sizeof(Seen); }

}  // namespace gpu
