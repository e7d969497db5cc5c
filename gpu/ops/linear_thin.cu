// Products of few rows: their time is that of reading the weights. A thread loads weights by sixteen bytes straight into its shares of tensor-core
// fragments – along the depth any order will do that both operands keep – and has up to twelve such loads under way.
#include "gpu/ops/linear.h"

#include "gpu/ops/thin_tile.h"
#include "gpu/tensor_core.h"

namespace gpu {
namespace {

using Index = std::int64_t;

/// kTokens: 8 or 16.
template <int kTokens>
struct ThinLinear {
  using Tile = ThinTile<kTokens>;
  using Shared = typename Tile::Shared;
  static constexpr int kStep = 32,                     // of the depth, in a warp's two products
                       kSteps = kTokens == 8 ? 3 : 2;  // loaded together: as many as leave registers for two blocks
  static constexpr unsigned kThreads = Tile::kThreads, kTogether = Tile::kTogether;
  struct Own {
    float sum[kTokens / 8][4];
    std::uint32_t w[2][kSteps][2][4], x[2][kSteps][kTokens / 8][4];
  };
  struct Piece : Tile::Piece {
    const Bf16* w;
    Index w_stride;
  };
  Piece pieces[Tile::kPieces];
  const Bf16* x;
  Index tokens, x_stride, depth, share;  ///< `share`: of the depth, a warp's, in whole steps
  int count;

  template <typename Block>
  GPU_CODE void operator()(Block& block) const {
    const auto& piece = Tile::piece_of(pieces, count, block);
    const Index first = (static_cast<Index>(block.x()) - piece.first) * Tile::kOutputs;
    block.each_apart([&](unsigned thread, Own& own) {
      GPU_UNROLL for (auto& half : own.sum)
        GPU_UNROLL for (auto& sum : half) sum = 0;
      load_weights<0>(thread, own, piece, first, 0);
      load_weights<1>(thread, own, piece, first, kSteps * kStep);
    });
    block.each_apart([&](unsigned thread, Own& own) {
      load_inputs<0>(thread, own, 0);
      load_inputs<1>(thread, own, kSteps * kStep);
    });
    for (Index at = 0; at < share; at += 2 * kSteps * kStep) {
      turn<0>(block, piece, first, at);
      turn<1>(block, piece, first, at + kSteps * kStep);
    }
    Tile::store(block, piece, first, tokens, [](Own& own) -> auto& { return own.sum; });
  }

 private:
  /// Multiplies what slot kSlot has and fills it again, while the other's loads are under way.
  template <int kSlot, typename Block>
  GPU_CODE void turn(Block& block, const Piece& piece, Index first, Index at) const {
    GPU_UNROLL for (int s = 0; s < kSteps; ++s)
      GPU_UNROLL for (int half = 0; half < 2; ++half)
        GPU_UNROLL for (int n = 0; n < kTokens / 8; ++n)
          mma_bf16(block, [=](Own& own) -> MmaShares { return {own.sum[n], own.w[kSlot][s][half], own.x[kSlot][s][n] + 2 * half}; });
    block.each_apart([&](unsigned thread, Own& own) {
      load_weights<kSlot>(thread, own, piece, first, at + 2 * kSteps * kStep);
      load_inputs<kSlot>(thread, own, at + 2 * kSteps * kStep);
    });
  }

  /// A thread's eight numbers of a step lie at `first` along the depth, those of the next kStep behind; none from `end` on.
  struct Part {
    Index first, end;
  };
  GPU_CODE Part part(unsigned thread, Index at) const {
    const auto from = static_cast<Index>(thread / 32) * share, to = from + share;
    return {from + at + static_cast<Index>(thread % 4) * 8, to < depth ? to : depth};
  }
  template <int kSlot>
  GPU_CODE void load_weights(unsigned thread, Own& own, const Piece& piece, Index first, Index at) const {
    const auto mine = part(thread, at);
    const Index row = first + thread % 32 / 4, last = piece.outputs - 1;  // rows behind the last are not stored
    const auto* const low = piece.w + (row < last ? row : last) * piece.w_stride + mine.first;
    const auto* const high = piece.w + (row + 8 < last ? row + 8 : last) * piece.w_stride + mine.first;
    GPU_UNROLL for (int s = 0; s < kSteps; ++s) {
      Words a{}, b{};
      if (mine.first + s * kStep < mine.end) a = load_once(low + s * kStep), b = load_once(high + s * kStep);
      GPU_UNROLL for (int half = 0; half < 2; ++half)
        GPU_UNROLL for (int i = 0; i < 2; ++i) own.w[kSlot][s][half][2 * i] = a.item[2 * half + i], own.w[kSlot][s][half][2 * i + 1] = b.item[2 * half + i];
    }
  }
  template <int kSlot>
  GPU_CODE void load_inputs(unsigned thread, Own& own, Index at) const {
    const auto mine = part(thread, at);
    GPU_UNROLL for (int n = 0; n < kTokens / 8; ++n) {
      const Index token = n * 8 + thread % 32 / 4;
      const auto* const row = x + (token < tokens ? token : tokens - 1) * x_stride + mine.first;
      GPU_UNROLL for (int s = 0; s < kSteps; ++s) {
        Words given{};
        if (mine.first + s * kStep < mine.end) given = *reinterpret_cast<const Words*>(row + s * kStep);
        GPU_UNROLL for (int i = 0; i < 4; ++i) own.x[kSlot][s][n][i] = given.item[i];
      }
    }
  }
};

template <int kTokens>
void start(StreamView on, const View& x, std::span<const LinearViews> all) {
  using Kernel = ThinLinear<kTokens>;
  constexpr Index kRound = Kernel::Tile::kWarps * Kernel::kStep;
  const Kernel kernel{{}, elements<const Bf16>(x), x.rows, x.stride, x.columns, (x.columns + kRound - 1) / kRound * Kernel::kStep, 0};
  Kernel::Tile::start(on, kernel, all, [](const View& w) -> typename Kernel::Piece { return {{}, elements<const Bf16>(w), w.stride}; });
}

}  // namespace

bool is_thin(const View& x, const View& w) {
  return x.rows > 0 && x.rows <= kThinRows && x.type == shard::DType::BF16 && w.type == shard::DType::BF16 && in_packs(x, kPack<Bf16>) && in_packs(w, kPack<Bf16>);
}

void thin_linears(StreamView on, const View& x, std::span<const LinearViews> all) {
  for (const auto& [w, bias, out] : all) {
    check_linear(x, w, bias, out);
    shard::require(is_thin(x, w), shard::Code::Device, [&] { return fmt::format("device: {} rows of {} are not few rows of bf16 in packs", x.rows, shard::name(x.type)); });
  }
  x.rows <= 8 ? start<8>(on, x, all) : start<16>(on, x, all);
}

}  // namespace gpu
