// A thread turns N pairs of one head. In bf16 the table and each product are rounded, as torch does.
#include "gpu/ops/rope.h"

#include "gpu/ops/numbers.h"

#include <algorithm>

namespace gpu {
namespace {

using Index = std::int64_t;

template <typename T, int N>
struct Rope {
  static constexpr unsigned kThreads = 128;
  struct Shared {};
  struct Own {};
  T* x;
  RopeView table;
  Index rows, stride, heads, head_stride, length, row_step;

  template <typename Block>
  GPU_CODE void operator()(Block& block) const {
    block.each_apart([&](unsigned thread, Own&) {
      const auto task = (static_cast<Index>(block.x()) * kThreads + thread) * N;
      if (task >= heads * table.half) return;
      const auto head = task / table.half, lane = task % table.half;
      for (Index r = block.y(); r < rows; r += row_step) {
        auto* const first = x + r * stride + head * head_stride;
        const auto at = r % length * table.half + lane;
        const auto cos = load_pack<N>(table.cos + at), sin = load_pack<N>(table.sin + at);
        if (table.interleaved) {
          auto pairs = load_pack<2 * N>(first + 2 * lane);
          for (int j = 0; j < N; ++j) turn(pairs.item[2 * j], pairs.item[2 * j + 1], cos.item[j], sin.item[j]);
          store_pack<2 * N>(first + 2 * lane, pairs);
        } else {
          auto low = load_pack<N>(first + lane), high = load_pack<N>(first + table.half + lane);
          for (int j = 0; j < N; ++j) turn(low.item[j], high.item[j], cos.item[j], sin.item[j]);
          store_pack<N>(first + lane, low);
          store_pack<N>(first + table.half + lane, high);
        }
      }
    });
  }
  GPU_CODE static void turn(T& first, T& second, float cos, float sin) {
    const float a = widen(first), b = widen(second), c = rounded<T>(cos), s = rounded<T>(sin);
    first = narrow<T>(rounded<T>(a * c) - rounded<T>(b * s));
    second = narrow<T>(rounded<T>(b * c) + rounded<T>(a * s));
  }
};

}  // namespace

void apply_rope(StreamView on, const RopeView& table, const View& x, std::int64_t heads, std::int64_t head_stride, std::int64_t length) {
  if (table.half == 0) return;
  with_activation_type(x.type, [&]<typename T>(T) {
    const auto run = [&]<int N>() {
      const Rope<T, N> kernel{elements<T>(x), table, x.rows, x.stride, heads, head_stride, length, std::min<Index>(x.rows, 65535)};
      launch(on, {blocks_for(static_cast<std::uint64_t>(heads * table.half), kernel.kThreads * N), static_cast<std::uint64_t>(kernel.row_step)},
             kernel);
    };
    constexpr int n = 4;  // of f32 as of bf16: two packs of pairs move either way
    const auto aligned = [&](const void* data, std::size_t bytes) { return reinterpret_cast<std::uintptr_t>(data) % bytes == 0; };
    const bool packs = table.half % n == 0 && head_stride % (2 * n) == 0 && x.stride % (2 * n) == 0 && aligned(x.data, 2 * n * sizeof(T)) &&
                       aligned(table.cos, n * sizeof(float)) && aligned(table.sin, n * sizeof(float));
    packs ? run.template operator()<n>() : run.template operator()<1>();
  });
}

}  // namespace gpu
