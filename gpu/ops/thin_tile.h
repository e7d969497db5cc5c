// What products of few rows have in common: a block has sixteen outputs of one of several weights, its warps parts of the depth, and what warps
// summed is added in their order.
#pragma once

#include "gpu/ops/numbers.h"

#include <algorithm>
#include <span>

namespace gpu {

/// kTokens: 8 or 16, the rows of x that a block has.
template <int kTokens>
struct ThinTile {
  static constexpr int kOutputs = 16, kPieces = 4, kWarps = 8;
  static constexpr unsigned kThreads = kWarps * 32, kTogether = 2;
  struct Shared {
    float part[kWarps][kTokens][kOutputs + 1];
  };
  /// One weight's share of the grid.
  struct Piece {
    Numbers bias;
    Results out;
    std::int64_t outputs, out_stride, first;  ///< `first`: its first block
  };

  /// Launches `kernel` for all of these linears, kPieces at a time; of(w) is what its own kind of weight is to a piece.
  template <typename Kernel, typename Views, typename Of>
  static void start(StreamView on, Kernel kernel, std::span<const Views> all, Of of) {
    while (!all.empty()) {
      const auto count = std::min<std::size_t>(all.size(), kPieces);
      std::uint64_t blocks = 0;
      for (std::size_t i = 0; i < count; ++i) {
        auto& piece = kernel.pieces[i] = of(all[i].w);
        piece.bias = numbers(all[i].bias);
        piece.out = results(all[i].out);
        piece.outputs = all[i].out.columns;
        piece.out_stride = all[i].out.stride;
        piece.first = static_cast<std::int64_t>(blocks);
        blocks += blocks_for(static_cast<std::uint64_t>(piece.outputs), kOutputs);
      }
      kernel.count = static_cast<int>(count);
      launch(on, {blocks}, kernel);
      all = all.subspan(count);
    }
  }

  /// The piece that a block belongs to, of `count`.
  template <typename AnyPiece, typename Block>
  GPU_CODE static const AnyPiece& piece_of(const AnyPiece (&pieces)[kPieces], int count, Block& block) {
    int p = 0;
    while (p + 1 < count && block.x() >= pieces[p + 1].first) ++p;
    return pieces[p];
  }

  /// Of number i in a thread's share of a product.
  GPU_CODE static int token_of(unsigned thread, int n, int i) { return n * 8 + static_cast<int>(thread % 4) * 2 + i % 2; }
  GPU_CODE static int output_of(unsigned thread, int i) { return static_cast<int>(thread % 32 / 4) + i / 2 * 8; }

  /// Adds what the warps summed, sums(own) being a thread's [kTokens / 8][4], and stores the outputs from `first` on.
  template <typename Block, typename Sums>
  GPU_CODE static void store(Block& block, const Piece& piece, std::int64_t first, std::int64_t tokens, Sums sums) {
    using Own = typename Block::Own;
    block.each([&](unsigned thread, Own& own) {
      GPU_UNROLL for (int n = 0; n < kTokens / 8; ++n)
        GPU_UNROLL for (int i = 0; i < 4; ++i) block.shared().part[thread / 32][token_of(thread, n, i)][output_of(thread, i)] = sums(own)[n][i];
    });
    block.each_apart([&](unsigned thread, Own&) {
      const int token = static_cast<int>(thread) / kOutputs, output = static_cast<int>(thread) % kOutputs;
      if (token >= tokens || first + output >= piece.outputs) return;
      float sum = 0;
      for (int warp = 0; warp < kWarps; ++warp) sum += block.shared().part[warp][token][output];
      piece.out.set(token * piece.out_stride + first + output, sum + (piece.bias.given() ? piece.bias[first + output] : 0.0f));
    });
  }
};

}  // namespace gpu
