// One tile a block; what differs is where the tile's operands lie.
#include "gpu/ops/linear.h"

#include "gpu/ops/route.h"
#include "gpu/ops/tensor_tile.h"
#include "gpu/ops/tile_product.h"

namespace gpu {
namespace {

using Index = std::int64_t;

template <typename Tile>
struct Linear : Tile {
  Operand x, w;
  Numbers bias;
  Results out;
  Index depth, out_stride, column_tiles;

  template <typename Block>
  GPU_CODE void operator()(Block& block) const {
    const Index row = block.x() / column_tiles * Tile::kRows, column = block.x() % column_tiles * Tile::kColumns;
    Tile::run(block, x.from(row), w.from(column), depth,
              [&](Index r, Index c, float sum) { out.set((row + r) * out_stride + column + c, sum + (bias.given() ? bias[column + c] : 0.0f)); });
  }
};

template <typename Tile>
struct GroupedLinear : Tile {
  Operand x;
  Results out;
  const std::byte* const* weights;
  const std::byte* const* biases;
  const std::int32_t* offsets;
  const std::int32_t* tiles;
  const float* row_weights;
  shard::DType type;
  Index outputs, depth, w_stride, out_stride;
  int experts;

  template <typename Block>
  GPU_CODE void operator()(Block& block) const {
    const auto tile = static_cast<std::int32_t>(block.y());
    if (tile >= tiles[experts]) return;  // the launch is for the worst case
    const int expert = expert_of(tiles, experts, tile);
    const Index row = offsets[expert] + (tile - tiles[expert]) * kExpertTile, column = static_cast<Index>(block.x()) * Tile::kColumns;
    auto mine = x.from(row);
    mine.rows = offsets[expert + 1] - row;
    Operand w{Numbers(weights[expert], type), outputs, w_stride, 1};
    const Numbers bias(biases ? biases[expert] : nullptr, type);
    Tile::run(block, mine, w.from(column), depth, [&](Index r, Index c, float sum) {
      const auto added = bias.given() ? bias[column + c] : 0.0f;
      out.set((row + r) * out_stride + column + c, row_weights ? out.as_stored(sum) + added * row_weights[row + r] : sum + added);
    });
  }
};

template <typename Tile>
struct Batched : Tile {
  Operand x, w;
  Results out;
  Index depth, out_stride, column_tiles, inner, first, ratio, x_outer, x_inner, w_outer, w_inner, out_outer, out_inner;

  template <typename Block>
  GPU_CODE void operator()(Block& block) const {
    const Index row = block.x() / column_tiles * Tile::kRows, column = block.x() % column_tiles * Tile::kColumns;
    const Index b = block.y() / inner, h = block.y() % inner;
    const auto to = b * out_outer + h * out_inner;
    Tile::run(block, x.behind(b * x_outer + h * x_inner).from(row), w.behind(b * w_outer + (first + h) / ratio * w_inner).from(column), depth,
              [&](Index r, Index c, float sum) { out.set(to + (row + r) * out_stride + column + c, sum); });
  }
};

/// Calls body(Tile{}) for the kind of tile that both operands allow.
template <typename Body>
void with_tile(shard::DType x, shard::DType w, Body&& body) {
  if (x == shard::DType::BF16 && w == shard::DType::BF16) body(TensorTile{});
  else body(TileProduct{});
}

void check_shapes(const View& x, Index outputs, Index inputs, const View& out) {
  shard::require(x.columns == inputs && out.rows == x.rows && out.columns == outputs, shard::Code::Device, [&] {
    return fmt::format("device: a weight [{}, {}] between [{}, {}] and [{}, {}]", outputs, inputs, x.rows, x.columns, out.rows, out.columns);
  });
}

}  // namespace

void check_linear(const View& x, const View& w, const View& bias, const View& out) {
  check_shapes(x, w.rows, w.columns, out);
  shard::require(!bias || bias.rows * bias.columns == w.rows, shard::Code::Device,
                 [&] { return fmt::format("device: {} biases for {} outputs", bias.rows * bias.columns, w.rows); });
}

void linear(StreamView on, const View& x, const View& w, const View& bias, const View& out) {
  check_linear(x, w, bias, out);
  with_tile(x.type, w.type, [&]<typename Tile>(Tile) {
    const auto rows = blocks_for(static_cast<std::uint64_t>(x.rows), Tile::kRows),
               columns = blocks_for(static_cast<std::uint64_t>(w.rows), Tile::kColumns);
    const Linear<Tile> kernel{
        {},         {numbers(x), x.rows, x.stride, 1}, {numbers(w), w.rows, w.stride, 1}, numbers(bias), results(out), x.columns,
        out.stride, static_cast<Index>(columns)};
    launch(on, {rows * columns}, kernel);
  });
}

void grouped_linear(StreamView on, const View& x, const ExpertWeights& w, std::int64_t experts, const std::int32_t* offsets,
                    const std::int32_t* tiles, const float* row_weights, const View& out) {
  static_assert(kExpertTile == TileProduct::kRows && kExpertTile == TensorTile::kRows);
  check_shapes(x, w.outputs, w.inputs, out);
  shard::require(is_number_type(w.type), shard::Code::Device, [&] { return fmt::format("device: weights of type {}", shard::name(w.type)); });
  with_tile(x.type, w.type, [&]<typename Tile>(Tile) {
    const GroupedLinear<Tile> kernel{{},           {numbers(x), x.rows, x.stride, 1},
                                     results(out), w.data,
                                     w.bias,       offsets,
                                     tiles,        row_weights,
                                     w.type,       w.outputs,
                                     x.columns,    w.stride,
                                     out.stride,   static_cast<int>(experts)};
    const auto rows = blocks_for(static_cast<std::uint64_t>(x.rows), Tile::kRows) + static_cast<std::uint64_t>(experts);
    launch(on, {blocks_for(static_cast<std::uint64_t>(w.outputs), Tile::kColumns), rows}, kernel);
  });
}

void batched_product(StreamView on, const BatchedProduct& p) {
  check_shapes(p.x, p.w.rows, p.w.columns, p.out);
  using Tile = TileProduct;
  const auto rows = blocks_for(static_cast<std::uint64_t>(p.x.rows), Tile::kRows),
             columns = blocks_for(static_cast<std::uint64_t>(p.w.rows), Tile::kColumns);
  const Batched<Tile> kernel{{},
                             {numbers(p.x), p.x.rows, p.x.stride, 1},
                             {numbers(p.w), p.w.rows, p.w.stride, p.w_k_stride},
                             results(p.out),
                             p.x.columns,
                             p.out.stride,
                             static_cast<Index>(columns),
                             p.inner,
                             p.first,
                             p.ratio,
                             p.x_outer,
                             p.x_inner,
                             p.w_outer,
                             p.w_inner,
                             p.out_outer,
                             p.out_inner};
  launch(on, {rows * columns, static_cast<std::uint64_t>(p.outer * p.inner)}, kernel);
}

}  // namespace gpu
