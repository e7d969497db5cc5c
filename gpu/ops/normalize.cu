// A warp for short rows, a block for long ones. Squares of a thread's pack are summed in f32, packs and threads in f64.
#include "gpu/ops/normalize.h"

#include "gpu/ops/numbers.h"

namespace gpu {
namespace {

using Index = std::int64_t;

template <typename T, int N, unsigned kGroup>
struct Normalize {
  static constexpr unsigned kThreads = kGroup == 32 ? 128 : kGroup;
  struct Shared {};
  struct Own {
    double sum;
    float mean;
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
      const auto row = at / pieces, lane = at % pieces * width;
      for (Index c = thread % kGroup * N; c < width; c += kGroup * N) {
        auto pack = load_pack<N>(x + row * x_stride + lane + c);
        if (branch) {
          const auto more = load_pack<N>(branch + row * branch_stride + lane + c);
          for (int j = 0; j < N; ++j) pack.item[j] = narrow<T>(widen(pack.item[j]) + widen(more.item[j]));
          store_pack<N>(stored + row * x_stride + lane + c, pack);
        }
        own.sum += partial(pack, 0, !layer);
      }
    });
    reduce(block);
    if (layer) {
      block.each_apart([&](unsigned thread, Own& own) {
        own.mean = static_cast<float>(own.sum / static_cast<double>(width));
        own.sum = 0;
        const auto at = first + thread / kGroup;
        if (at >= count) return;
        const auto* from = x + at / pieces * x_stride + at % pieces * width;
        for (Index c = thread % kGroup * N; c < width; c += kGroup * N) own.sum += partial(load_pack<N>(from + c), own.mean, true);
      });
      reduce(block);
    }
    block.each_apart([&](unsigned thread, Own& own) {
      const auto at = first + thread / kGroup;
      if (at >= count) return;
      const float factor = 1.0f / sqrtf(static_cast<float>(own.sum / static_cast<double>(width) + static_cast<double>(epsilon)));
      const auto row = at / pieces, lane = at % pieces * width;
      for (Index c = thread % kGroup * N; c < width; c += kGroup * N) {
        auto pack = load_pack<N>(x + row * x_stride + lane + c);
        float w[N] = {}, b[N] = {};
        if (weight.given()) weight.read<N>(c, w);
        if (bias.given()) bias.read<N>(c, b);
        for (int j = 0; j < N; ++j) {
          float y = (widen(pack.item[j]) - own.mean) * factor;
          if (!layer && !zero_centered) y = rounded<T>(y);  // Llama's type casts before it scales
          if (weight.given()) y *= w[j] + (zero_centered ? 1.0f : 0.0f);
          if (bias.given()) y += b[j];
          pack.item[j] = narrow<T>(y);
        }
        store_pack<N>(out + row * out_stride + lane + c, pack);
      }
    });
  }

 private:
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
    const auto run = [&]<int N, unsigned kGroup>() {
      const Normalize<T, N, kGroup> kernel{elements<const T>(x),
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
    if (width <= 512) packs ? run.template operator()<n, 32>() : run.template operator()<1, 32>();
    else packs ? run.template operator()<n, 256>() : run.template operator()<1, 256>();
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
