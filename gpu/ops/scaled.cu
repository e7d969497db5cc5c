// A warp finds a block's scale and rounds its numbers; products go by tiles of gpu/ops/scaled_tile.h.
#include "gpu/ops/scaled.h"

#include "gpu/ops/route.h"
#include "gpu/ops/scaled_tile.h"
#include "libshard/error.h"

namespace gpu {
namespace {

using Index = std::int64_t;

template <typename T>
struct QuantiseRows {
  static constexpr unsigned kWarps = 4, kThreads = kWarps * 32, kEach = static_cast<unsigned>(kScaleBlock) / 32;
  struct Shared {};
  struct Own {
    float value[kEach], most;
  };
  const T* x;
  std::byte* numbers;
  float* scales;
  Index rows, columns, x_stride, stride, scale_pitch, first, blocks;

  template <typename Block>
  GPU_CODE void operator()(Block& block) const {
    const auto place = [&](unsigned thread) { return static_cast<Index>(block.x()) * kWarps + thread / 32; };  // of rows × blocks
    const auto lane = [&](unsigned thread, unsigned i) { return place(thread) % blocks * kScaleBlock - first + thread % 32 + i * 32; };
    block.each_apart([&](unsigned thread, Own& own) {
      own.most = 0;
      const auto row = place(thread) / blocks;
      GPU_UNROLL for (unsigned i = 0; i < kEach; ++i) {
        const auto k = lane(thread, i);
        own.value[i] = row < rows && k >= 0 && k < columns ? widen(x[row * x_stride + k]) : 0.0f;
        own.most = larger(own.most, fabsf(own.value[i]));
      }
    });
    block.warp_max(&Own::most);
    block.each_apart([&](unsigned thread, Own& own) {
      const auto row = place(thread) / blocks;
      if (row >= rows) return;
      const float scale = lm::scale_for(own.most);
      if (thread % 32 == 0) scales[place(thread) % blocks * scale_pitch + row] = scale;
      GPU_UNROLL for (unsigned i = 0; i < kEach; ++i) {
        const auto k = lane(thread, i);
        if (k >= 0 && k < columns) numbers[row * stride + k] = static_cast<std::byte>(shard::narrow<shard::kE4M3>(as_bits(own.value[i] / scale)));
      }
    });
  }
};

/// How scales of a weight are found.
struct WeightScales {
  const float* first;
  Index pitch, first_row;
  GPU_CODE float at(Index row, Index block) const { return first[(first_row + row) / kScaleBlock * pitch + block]; }
};

struct ScaledLinear : ScaledTile {
  ScaledOperand x, w;
  const float* x_scales;
  WeightScales w_scales;
  Numbers bias;
  Results out;
  Index x_scale_pitch, depth, out_stride, column_tiles;
  int first;

  template <typename Block>
  GPU_CODE void operator()(Block& block) const {
    const Index row = block.x() / column_tiles * kRows, column = block.x() % column_tiles * kColumns;
    run(
        block, x.from(row), w.from(column), depth, first, [&](Index r, Index b) { return x_scales[b * x_scale_pitch + row + r]; },
        [&](Index c, Index b) { return w_scales.at(column + c, b); },
        [&](Index r, Index c, float sum) { out.set((row + r) * out_stride + column + c, sum + (bias.given() ? bias[column + c] : 0.0f)); });
  }
};

struct GroupedScaledLinear : ScaledTile {
  ScaledOperand x;
  const float* x_scales;
  Results out;
  const std::byte* const* weights;
  const float* const* scales;
  const std::byte* const* biases;
  const std::int32_t* offsets;
  const std::int32_t* tiles;
  const float* row_weights;
  shard::DType bias_type;
  Index x_scale_pitch, outputs, depth, w_stride, w_scale_pitch, first_row, out_stride;
  int experts, first;

  template <typename Block>
  GPU_CODE void operator()(Block& block) const {
    const auto tile = static_cast<std::int32_t>(block.y());
    if (tile >= tiles[experts]) return;  // the launch is for the worst case
    const int expert = expert_of(tiles, experts, tile);
    const Index row = offsets[expert] + (tile - tiles[expert]) * kExpertTile, column = static_cast<Index>(block.x()) * kColumns;
    auto mine = x.from(row);
    mine.rows = offsets[expert + 1] - row;
    const WeightScales w_scales{scales[expert], w_scale_pitch, first_row};
    const Numbers bias(biases ? biases[expert] : nullptr, bias_type);
    run(
        block, mine, ScaledOperand{weights[expert], outputs, w_stride}.from(column), depth, first, [&](Index r, Index b) { return x_scales[b * x_scale_pitch + row + r]; },
        [&](Index c, Index b) { return w_scales.at(column + c, b); },
        [&](Index r, Index c, float sum) {
          const auto added = bias.given() ? bias[column + c] : 0.0f;
          out.set((row + r) * out_stride + column + c, row_weights ? out.as_stored(sum) + added * row_weights[row + r] : sum + added);
        });
  }
};

}  // namespace

void check_scaled(const ScaledRows& x, const ScaledWeight& like) {
  shard::require(x.numbers.type == shard::DType::F8E4M3 && like.numbers.type == shard::DType::F8E4M3, shard::Code::Device, [] { return std::string("device: products in fp8 take e4m3"); });
  shard::require(x.first == like.first_column && x.first >= 0 && x.first < kScaleBlock && like.first_row >= 0, shard::Code::Device,
                 [&] { return fmt::format("device: blocks of activations begin {} lanes before the first, those of the weight {}", x.first, like.first_column); });
}

void quantise_rows(StreamView on, const View& x, const ScaledRows& out) {
  shard::require(out.numbers.rows == x.rows && out.numbers.columns == x.columns && out.scale_pitch >= x.rows, shard::Code::Device,
                 [&] { return fmt::format("device: [{}, {}] as fp8 in [{}, {}]", x.rows, x.columns, out.numbers.rows, out.numbers.columns); });
  with_activation_type(x.type, [&]<typename T>(T) {
    const auto blocks = lm::blocks_of(x.columns, out.first);
    const QuantiseRows<T> kernel{elements<const T>(x), out.numbers.data, out.scales, x.rows, x.columns, x.stride, out.numbers.stride, out.scale_pitch, out.first, blocks};
    launch(on, {blocks_for(static_cast<std::uint64_t>(x.rows * blocks), kernel.kWarps)}, kernel);
  });
}

void scaled_linear(StreamView on, const ScaledRows& x, const ScaledWeight& w, const View& bias, const View& out) {
  check_scaled(x, w);
  check_linear(x.numbers, w.numbers, bias, out);
  const auto rows = blocks_for(static_cast<std::uint64_t>(x.numbers.rows), ScaledTile::kRows), columns = blocks_for(static_cast<std::uint64_t>(w.numbers.rows), ScaledTile::kColumns);
  const ScaledLinear kernel{{},
                            {x.numbers.data, x.numbers.rows, x.numbers.stride},
                            {w.numbers.data, w.numbers.rows, w.numbers.stride},
                            x.scales,
                            {w.scales, w.scale_pitch, w.first_row},
                            numbers(bias),
                            results(out),
                            x.scale_pitch,
                            x.numbers.columns,
                            out.stride,
                            static_cast<Index>(columns),
                            static_cast<int>(x.first)};
  launch(on, {rows * columns}, kernel);
}

void grouped_scaled_linear(StreamView on, const ScaledRows& x, const ExpertWeights& w, const float* const* scales, const ScaledWeight& like, std::int64_t experts,
                           const std::int32_t* offsets, const std::int32_t* tiles, const float* row_weights, const View& out) {
  static_assert(kExpertTile == ScaledTile::kRows);
  check_scaled(x, like);
  shard::require(x.numbers.columns == w.inputs && out.columns == w.outputs && out.rows == x.numbers.rows, shard::Code::Device,
                 [&] { return fmt::format("device: experts [{}, {}] between [{}, {}] and [{}, {}]", w.outputs, w.inputs, x.numbers.rows, x.numbers.columns, out.rows, out.columns); });
  const GroupedScaledLinear kernel{{},
                                   {x.numbers.data, x.numbers.rows, x.numbers.stride},
                                   x.scales,
                                   results(out),
                                   w.data,
                                   scales,
                                   w.bias,
                                   offsets,
                                   tiles,
                                   row_weights,
                                   w.type,
                                   x.scale_pitch,
                                   w.outputs,
                                   w.inputs,
                                   w.stride,
                                   like.scale_pitch,
                                   like.first_row,
                                   out.stride,
                                   static_cast<int>(experts),
                                   static_cast<int>(x.first)};
  const auto rows = blocks_for(static_cast<std::uint64_t>(x.numbers.rows), ScaledTile::kRows) + static_cast<std::uint64_t>(experts);
  launch(on, {blocks_for(static_cast<std::uint64_t>(w.outputs), ScaledTile::kColumns), rows}, kernel);
}

}  // namespace gpu
