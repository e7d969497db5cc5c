// A block takes a row of logits in one pass: each thread keeps a maximum and a sum of its own, exponentials of a pack in f32, packs in f64.
#include "gpu/ops/cross_entropy.h"

#include "gpu/ops/numbers.h"

#include <algorithm>

namespace gpu {
namespace {

using Index = std::int64_t;

/// Towards a maximum that may be −∞: nothing was there then.
GPU_CODE double shifted(double sum, float from, float to) {
  return sum == 0 || from == to ? sum : sum * exp(static_cast<double>(from) - static_cast<double>(to));
}

struct Start {
  static constexpr unsigned kThreads = 128;
  struct Shared {};
  struct Own {};
  CrossEntropyState state;
  template <typename Block>
  GPU_CODE void operator()(Block& block) const {
    block.each_apart([&](unsigned thread, Own&) {
      const auto r = static_cast<Index>(block.x()) * kThreads + thread;
      if (r >= state.rows) return;
      state.top[r] = lowest();
      state.sum[r] = 0;
      state.target[r] = 0;
    });
  }
};

template <typename T, int N>
struct Add {
  static constexpr unsigned kThreads = 256;
  struct Shared {};
  struct Own {
    float top, all;
    double sum;
    unsigned peak, nonfinite;
  };
  CrossEntropyState state;
  const T* logits;
  const std::int64_t* labels;
  LogitsPeak* peak;
  Index stride, columns, first;

  template <typename Block>
  GPU_CODE void operator()(Block& block) const {
    const auto r = static_cast<Index>(block.x());
    const T* const row = logits + r * stride;
    block.each_apart([&](unsigned thread, Own& own) {
      own = {lowest(), lowest(), 0, 0, 0};
      for (Index c = static_cast<Index>(thread) * N; c + N <= columns; c += kThreads * N) take(load_pack<N>(row + c), own);
      for (Index c = columns / N * N + thread; c < columns; c += kThreads) take(load_pack<1>(row + c), own);
      own.all = own.top;
    });
    block.max(&Own::all);
    block.each_apart([&](unsigned, Own& own) { own.sum = shifted(own.sum, own.top, own.all); });
    block.sum(&Own::sum);
    block.each_apart([&](unsigned thread, Own& own) {
      if (thread) return;
      const float before = state.top[r], top = larger(before, own.all);
      state.sum[r] = shifted(state.sum[r], before, top) + shifted(own.sum, own.all, top);
      state.top[r] = top;
      if (const auto label = labels[r]; label >= first && label < first + columns) state.target[r] = widen(row[label - first]);
    });
    if (!peak) return;
    block.max(&Own::peak);
    block.sum(&Own::nonfinite);
    block.each_apart([&](unsigned thread, Own& own) {  // whole numbers: the order of blocks does not matter
      if (thread) return;
      if (own.peak > peak->peak_bits) atomic_max(&peak->peak_bits, own.peak);
      if (own.nonfinite) atomic_add(&peak->nonfinite, static_cast<unsigned long long>(own.nonfinite));
    });
  }

 private:
  template <int M>
  GPU_CODE void take(const Pack<T, M>& pack, Own& own) const {
    float top = own.top;
    for (int j = 0; j < M; ++j) top = larger(top, widen(pack.item[j]));
    own.sum = shifted(own.sum, own.top, top);
    own.top = top;
    const float shift = top == lowest() ? 0.0f : top;
    float sum = 0;
    for (int j = 0; j < M; ++j) sum += expf(widen(pack.item[j]) - shift);
    own.sum += static_cast<double>(sum);
    if (peak)
      for (int j = 0; j < M; ++j) {
        const auto bits = as_bits(widen(pack.item[j])) & 0x7fffffffu;
        if (bits >= 0x7f800000u) ++own.nonfinite;
        else own.peak = bits > own.peak ? bits : own.peak;
      }
  }
};

struct Shift {
  static constexpr unsigned kThreads = 128;
  struct Shared {};
  struct Own {};
  CrossEntropyState state;
  const float* top;
  template <typename Block>
  GPU_CODE void operator()(Block& block) const {
    block.each_apart([&](unsigned thread, Own&) {
      const auto r = static_cast<Index>(block.x()) * kThreads + thread;
      if (r >= state.rows) return;
      state.sum[r] = shifted(state.sum[r], state.top[r], top[r]);
      state.top[r] = top[r];
    });
  }
};

struct Finish {
  static constexpr unsigned kThreads = 128;
  struct Shared {};
  struct Own {};
  CrossEntropyState state;
  const std::int64_t* labels;
  float* losses;
  Index limit;
  template <typename Block>
  GPU_CODE void operator()(Block& block) const {
    block.each_apart([&](unsigned thread, Own&) {
      const auto r = static_cast<Index>(block.x()) * kThreads + thread;
      if (r >= state.rows) return;
      // A label out of range counts as p = 0 behind the shift, not before it.
      const auto p = labels[r] >= 0 && labels[r] < limit ? static_cast<double>(state.target[r]) - static_cast<double>(state.top[r]) : 0.0;
      losses[r] = static_cast<float>(log(state.sum[r]) - p);
    });
  }
};

std::uint64_t blocks(Index rows, unsigned threads) { return blocks_for(static_cast<std::uint64_t>(rows), threads); }

}  // namespace

void cross_entropy_start(StreamView on, const CrossEntropyState& state) { launch(on, {blocks(state.rows, Start::kThreads)}, Start{state}); }

void cross_entropy_add(StreamView on, const CrossEntropyState& state, const View& block, std::int64_t first, std::int64_t limit,
                       const std::int64_t* labels, LogitsPeak* peak) {
  const auto columns = std::min(block.columns, limit - first);
  if (columns <= 0) return;
  shard::require(block.rows == state.rows, shard::Code::Device,
                 [&] { return fmt::format("device: logits of {} rows for {} labels", block.rows, state.rows); });
  with_activation_type(block.type, [&]<typename T>(T) {
    const auto run = [&]<int N>() {
      launch(on, {static_cast<std::uint64_t>(block.rows)}, Add<T, N>{state, elements<const T>(block), labels, peak, block.stride, columns, first});
    };
    constexpr int n = kPack<T>;
    in_packs(block.column_range(0, n), n) ? run.template operator()<n>() : run.template operator()<1>();
  });
}

void cross_entropy_shift(StreamView on, const CrossEntropyState& state, const float* top) {
  launch(on, {blocks(state.rows, Shift::kThreads)}, Shift{state, top});
}

void cross_entropy_finish(StreamView on, const CrossEntropyState& state, std::int64_t limit, const std::int64_t* labels, float* losses) {
  launch(on, {blocks(state.rows, Finish::kThreads)}, Finish{state, labels, losses, limit});
}

}  // namespace gpu
