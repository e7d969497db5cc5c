// Products of few rows: their time is that of reading the weights. A block has sixteen outputs, its warps parts of the depth; a thread loads
// weights by sixteen bytes straight into its shares of tensor-core fragments – along the depth any order will do that both operands keep – and
// has up to twelve such loads under way. What warps summed is added in their order.
#include "gpu/ops/linear.h"

#include "gpu/ops/numbers.h"
#include "gpu/tensor_core.h"

#include <algorithm>

namespace gpu {
namespace {

using Index = std::int64_t;

constexpr int kOutputs = 16, kPieces = 4;

/// kTokens: 8 or 16.
template <int kTokens>
struct ThinLinear {
  static constexpr int kWarps = 8, kStep = 32,  // of the depth, in a warp's two products
                       kSteps = kTokens == 8 ? 3 : 2;  // loaded together: as many as leave registers for two blocks
  static constexpr unsigned kThreads = kWarps * 32, kTogether = 2;
  struct Shared {
    float part[kWarps][kTokens][kOutputs + 1];
  };
  struct Own {
    float sum[kTokens / 8][4];
    std::uint32_t w[2][kSteps][2][4], x[2][kSteps][kTokens / 8][4];
  };
  struct Piece {
    const Bf16* w;
    Numbers bias;
    Results out;
    Index outputs, w_stride, out_stride, first;  ///< `first`: its first block
  };
  Piece pieces[kPieces];
  const Bf16* x;
  Index tokens, x_stride, depth, share;          ///< `share`: of the depth, a warp's, in whole steps
  int count;

  template <typename Block>
  GPU_CODE void operator()(Block& block) const {
    const auto& piece = piece_of(block);
    const Index first = (static_cast<Index>(block.x()) - piece.first) * kOutputs;
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
    block.each([&](unsigned thread, Own& own) {
      GPU_UNROLL for (int n = 0; n < kTokens / 8; ++n)
        GPU_UNROLL for (int i = 0; i < 4; ++i)
          block.shared().part[thread / 32][n * 8 + static_cast<int>(thread % 4) * 2 + i % 2][thread % 32 / 4 + static_cast<unsigned>(i / 2) * 8] = own.sum[n][i];
    });
    block.each_apart([&](unsigned thread, Own&) {
      const int token = static_cast<int>(thread) / kOutputs, output = static_cast<int>(thread) % kOutputs;
      if (token >= tokens || first + output >= piece.outputs) return;
      float sum = 0;
      for (int warp = 0; warp < kWarps; ++warp) sum += block.shared().part[warp][token][output];
      piece.out.set(token * piece.out_stride + first + output, sum + (piece.bias.given() ? piece.bias[first + output] : 0.0f));
    });
  }

 private:
  template <typename Block>
  GPU_CODE const Piece& piece_of(Block& block) const {
    int p = 0;
    while (p + 1 < count && block.x() >= pieces[p + 1].first) ++p;
    return pieces[p];
  }

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
  constexpr Index kRound = Kernel::kWarps * Kernel::kStep;
  Kernel kernel{{}, elements<const Bf16>(x), x.rows, x.stride, x.columns, (x.columns + kRound - 1) / kRound * Kernel::kStep, static_cast<int>(all.size())};
  std::uint64_t blocks = 0;
  for (std::size_t i = 0; i < all.size(); ++i) {
    const auto& [w, bias, out] = all[i];
    kernel.pieces[i] = {elements<const Bf16>(w), numbers(bias), results(out), w.rows, w.stride, out.stride, static_cast<Index>(blocks)};
    blocks += blocks_for(static_cast<std::uint64_t>(w.rows), kOutputs);
  }
  launch(on, {blocks}, kernel);
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
  for (; !all.empty(); all = all.subspan(std::min<std::size_t>(all.size(), kPieces))) {
    const auto some = all.first(std::min<std::size_t>(all.size(), kPieces));
    x.rows <= 8 ? start<8>(on, x, some) : start<16>(on, x, some);
  }
}

}  // namespace gpu
