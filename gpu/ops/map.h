// Elementwise work: out[r, c] = f(r, c, inputs[r, c]), computed in f32 and rounded once.
#pragma once

#include "gpu/ops/numbers.h"

#include <algorithm>
#include <array>

namespace gpu {

template <typename T>
struct Cells {
  T* data;
  std::int64_t stride;
};

/// A thread takes N neighbours of every row_step-th row.
template <typename Out, typename In, int kInputs, int N, typename F>
struct Map {
  static constexpr unsigned kThreads = 256;
  struct Shared {};
  struct Own {};
  Cells<Out> out;
  Cells<const In> in[kInputs + 1];  // the last is not used: there may be none
  F f;
  std::int64_t rows, columns, row_step;

  template <typename Block>
  GPU_CODE void operator()(Block& block) const {
    block.each_apart([&](unsigned thread, Own&) {
      const auto column = (static_cast<std::int64_t>(block.x()) * kThreads + thread) * N;
      if (column >= columns) return;
      for (std::int64_t r = block.y(); r < rows; r += row_step) {
        Pack<In, N> given[kInputs + 1];
        for (int i = 0; i < kInputs; ++i) given[i] = load_pack<N>(in[i].data + r * in[i].stride + column);
        Pack<Out, N> made;
        for (int j = 0; j < N; ++j) {
          float x[kInputs + 1];
          for (int i = 0; i < kInputs; ++i) x[i] = widen(given[i].item[j]);
          made.item[j] = narrow<Out>(f(r, column + j, x));
        }
        store_pack<N>(out.data + r * out.stride + column, made);
      }
    });
  }
};

/// `f` is a struct with `float operator()(row, column, const float* inputs) const` and `kPlaceless`, whether it ignores row and column.
/// All views have out's rows and columns; the inputs are of type In.
template <typename Out, typename In, int kInputs, typename F>
void map(StreamView on, View out, std::array<View, kInputs> in, const F& f) {
  bool whole = out.stride == out.columns;
  for (const auto& view : in) {
    shard::require(view.rows == out.rows && view.columns == out.columns, shard::Code::Device, [&] {
      return fmt::format("device: [{}, {}] and [{}, {}] in one elementwise op", view.rows, view.columns, out.rows, out.columns);
    });
    whole = whole && view.stride == view.columns;
  }
  if (F::kPlaceless && whole) {  // one long row
    const auto flat = [](const View& view) { return View{view.data, view.type, 1, view.rows * view.columns, view.rows * view.columns}; };
    out = flat(out);
    for (auto& view : in) view = flat(view);
  }
  const auto start = [&]<int N>() {
    Map<Out, In, kInputs, N, F> kernel{{elements<Out>(out), out.stride}, {}, f, out.rows, out.columns, std::min<std::int64_t>(out.rows, 65535)};
    std::transform(in.begin(), in.end(), kernel.in, [](const View& view) { return Cells<const In>{elements<const In>(view), view.stride}; });
    launch(on, {blocks_for(static_cast<std::uint64_t>(out.columns), kernel.kThreads * N), static_cast<std::uint64_t>(kernel.row_step)}, kernel);
  };
  constexpr int n = std::min(kPack<Out>, kPack<In>);
  bool packs = in_packs(out, n);
  for (const auto& view : in) packs = packs && in_packs(view, n);
  if (packs) start.template operator()<n>();
  else start.template operator()<1>();
}

}  // namespace gpu
