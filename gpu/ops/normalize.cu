// A warp for rows that its registers hold, a block for longer ones and where there are few. Squares of a thread's pack are summed in f32, packs and threads in f64.
#include "gpu/ops/normalize.h"

#include "gpu/ops/numbers.h"

namespace gpu {
namespace {

using Index = std::int64_t;

constexpr Index kManyRows = 512;  ///< a device's multiprocessors have work in warps then

/// The first kHeld packs of a thread stay in its registers; only what a longer row has beyond them is read again.
template <typename T, int N, unsigned kGroup, int kHeld>
struct Normalize {
  static constexpr unsigned kThreads = kGroup == 32 ? 128 : kGroup;
  static constexpr Index kStep = kGroup * N;  ///< from pack to pack of a thread
  struct Shared {};
  struct Own {
    double sum;
    float mean;
    Pack<T, N> held[kHeld];
  };
  const T* x;
  const T* branch;  ///< added to x first, or none
  T* stored;        ///< where that sum goes: x
  T* out;
  Numbers weight, bias;
  Index x_stride, branch_stride, out_stride, pieces, width, count;  ///< `count` rows × pieces
  float epsilon;
  bool layer, zero_centered;

  template <typename Block>
  GPU_CODE void operator()(Block& block) const {
    const Index first = static_cast<Index>(block.x()) * (kThreads / kGroup);
    block.each_apart([&](unsigned thread, Own& own) {
      own.sum = 0;
      own.mean = 0;
      const auto at = first + thread / kGroup;
      if (at >= count) return;
      const auto row = at / pieces, lane = at % pieces * width + thread % kGroup * N, end = width - thread % kGroup * N;
      const auto* from = x + row * x_stride + lane;
      GPU_UNROLL
      for (int p = 0; p < kHeld; ++p)
        if (p * kStep < end) own.held[p] = load_pack<N>(from + p * kStep);
      if (branch) {
        const auto* more = branch + row * branch_stride + lane;
        auto* to = stored + row * x_stride + lane;
        Pack<T, N> added[kHeld]{};
        GPU_UNROLL
        for (int p = 0; p < kHeld; ++p)  // all reads are under way before the first write
          if (p * kStep < end) added[p] = load_pack<N>(more + p * kStep);
        GPU_UNROLL
        for (int p = 0; p < kHeld; ++p)
          if (p * kStep < end) {
            own.held[p] = added_up(own.held[p], added[p]);
            store_pack<N>(to + p * kStep, own.held[p]);
          }
        for (Index c = kHeld * kStep; c < end; c += kStep) store_pack<N>(to + c, added_up(load_pack<N>(from + c), load_pack<N>(more + c)));
      }
      each_pack(own, from, end, [&](Index, const Pack<T, N>& pack) { own.sum += partial(pack, 0, !layer); });
    });
    reduce(block);
    if (layer) {
      block.each_apart([&](unsigned thread, Own& own) {
        own.mean = static_cast<float>(own.sum / static_cast<double>(width));
        own.sum = 0;
        const auto at = first + thread / kGroup;
        if (at >= count) return;
        const auto lane = at % pieces * width + thread % kGroup * N;
        each_pack(own, x + at / pieces * x_stride + lane, width - thread % kGroup * N, [&](Index, const Pack<T, N>& pack) { own.sum += partial(pack, own.mean, true); });
      });
      reduce(block);
    }
    block.each_apart([&](unsigned thread, Own& own) {
      const auto at = first + thread / kGroup;
      if (at >= count) return;
      const float factor = 1.0f / sqrtf(static_cast<float>(own.sum / static_cast<double>(width) + static_cast<double>(epsilon)));
      const auto row = at / pieces, begin = static_cast<Index>(thread % kGroup) * N, lane = at % pieces * width + begin;
      each_pack(own, x + row * x_stride + lane, width - begin, [&](Index c, Pack<T, N> pack) {
        float w[N] = {}, b[N] = {};
        if (weight.given()) weight.read<N>(begin + c, w);
        if (bias.given()) bias.read<N>(begin + c, b);
        for (int j = 0; j < N; ++j) {
          float y = (widen(pack.item[j]) - own.mean) * factor;
          if (!layer && !zero_centered) y = rounded<T>(y);  // Llama's type casts before it scales
          if (weight.given()) y *= w[j] + (zero_centered ? 1.0f : 0.0f);
          if (bias.given()) y += b[j];
          pack.item[j] = narrow<T>(y);
        }
        store_pack<N>(out + row * out_stride + lane + c, pack);
      });
    });
  }

 private:
  /// body(place, pack) for a thread's packs from `from` on, `end` elements before the row's end.
  template <typename Body>
  GPU_CODE static void each_pack(const Own& own, const T* from, Index end, Body&& body) {
    GPU_UNROLL
    for (int p = 0; p < kHeld; ++p)
      if (p * kStep < end) body(p * kStep, own.held[p]);
    for (Index c = kHeld * kStep; c < end; c += kStep) body(c, load_pack<N>(from + c));
  }
  GPU_CODE static Pack<T, N> added_up(Pack<T, N> pack, const Pack<T, N>& more) {
    for (int j = 0; j < N; ++j) pack.item[j] = narrow<T>(widen(pack.item[j]) + widen(more.item[j]));
    return pack;
  }
  GPU_CODE static double partial(const Pack<T, N>& pack, float shift, bool squares) {
    float sum = 0;
    for (int j = 0; j < N; ++j) {
      const float value = widen(pack.item[j]) - shift;
      sum += squares ? value * value : value;
    }
    return static_cast<double>(sum);
  }
  template <typename Block>
  GPU_CODE void reduce(Block& block) const {
    if constexpr (kGroup == 32) block.warp_sum(&Own::sum);
    else block.sum(&Own::sum);
  }
};

void start(StreamView on, const NormConfig& config, const View& x, const View& branch, const View& weight, const View& bias, const View& out,
           Index pieces, Index width) {
  shard::require(out.type == x.type && (!branch || branch.type == x.type), shard::Code::Device, [] { return "device: a norm of two types"; });
  shard::require(pieces * width <= x.columns && out.rows == x.rows && pieces * width <= out.columns &&
                     (!branch || (branch.rows == x.rows && branch.columns == x.columns)),
                 shard::Code::Device, [&] { return fmt::format("device: a norm over {} × {} lanes of [{}, {}]", pieces, width, x.rows, x.columns); });
  for (const auto* given : {&weight, &bias})
    shard::require(!*given || given->rows * given->columns == width, shard::Code::Device,
                   [&] { return fmt::format("device: a norm over {} features has {} weights", width, given->rows * given->columns); });
  with_activation_type(x.type, [&]<typename T>(T) {
    const auto run = [&]<int N, unsigned kGroup, int kHeld>() {
      const Normalize<T, N, kGroup, kHeld> kernel{elements<const T>(x),
                                           elements<const T>(branch),
                                           elements<T>(x),
                                           elements<T>(out),
                                           numbers(weight),
                                           numbers(bias),
                                           x.stride,
                                           branch.stride,
                                           out.stride,
                                           pieces,
                                           width,
                                           x.rows * pieces,
                                           static_cast<float>(config.epsilon),
                                           config.kind == shard::Normalization::LayerNorm,
                                           config.zero_centered};
      launch(on, {blocks_for(static_cast<std::uint64_t>(kernel.count), kernel.kThreads / kGroup)}, kernel);
    };
    constexpr int n = kPack<T>;
    const bool packs = width % n == 0 && in_packs(x.column_range(0, pieces * width), n) && in_packs(branch, n) &&
                       in_packs(out.column_range(0, pieces * width), n) && in_packs(weight, n) && in_packs(bias, n);
    if (!packs) return width <= 512 ? run.template operator()<1, 32, 8>() : run.template operator()<1, 256, 8>();
    if (width <= 32 * n) return run.template operator()<n, 32, 1>();  // a head's lanes
    // Few rows take as long as one does: in a block's hands it waits for memory once, in a warp's several times.
    if (width <= 32 * n * 8 && x.rows * pieces >= kManyRows) return run.template operator()<n, 32, 8>();
    run.template operator()<n, 256, 4>();
  });
}

}  // namespace

void normalize(StreamView on, const NormConfig& config, const View& x, const View& weight, const View& bias, const View& out) {
  start(on, config, x, {}, weight, bias, out, 1, x.columns);
}
void add_normalize(StreamView on, const NormConfig& config, const View& hidden, const View& branch, const View& weight, const View& bias,
                   const View& out) {
  start(on, config, hidden, branch, weight, bias, out, 1, hidden.columns);
}
void normalize_pieces(StreamView on, const NormConfig& config, const View& x, std::int64_t pieces, std::int64_t width, const View& weight,
                      const View& bias) {
  start(on, config, x, {}, weight, bias, x, pieces, width);
}

}  // namespace gpu
