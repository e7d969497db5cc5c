// Products in fp8 of few rows: their time is that of reading the weights. As in gpu/ops/linear_thin, but that a thread's sixteen bytes of a row are
// sixteen numbers, which become bf16 in its registers, and what a step of the depth summed is multiplied by its scales.
#include "gpu/ops/scaled.h"
#include "gpu/ops/scaled_tile.h"
#include "gpu/ops/thin_tile.h"

namespace gpu {
namespace {

using Index = std::int64_t;

/// kTokens: 8 or 16.
template <int kTokens>
struct ThinScaled {
  using Tile = ThinTile<kTokens>;
  using Shared = typename Tile::Shared;
  static constexpr int kStep = 64,                     // of the depth, within a block of scales: four products of a warp
                       kSteps = kTokens == 8 ? 3 : 2;  // loaded together
  static constexpr unsigned kThreads = Tile::kThreads, kTogether = Tile::kTogether;
  struct Own {
    float sum[kTokens / 8][4], total[kTokens / 8][4];
    Words low[2][kSteps], high[2][kSteps], x[2][kSteps][kTokens / 8];
    std::uint32_t a[4], b[2];
  };
  struct Piece : Tile::Piece {
    const std::byte* w;
    const float* scales;
    Index w_stride, scale_pitch, first_row;
  };
  Piece pieces[Tile::kPieces];
  const std::byte* x;
  const float* x_scales;
  Index tokens, x_stride, x_scale_pitch, begin, end, share;  ///< [begin, end): the depth, counted from the start of the first block of scales; `share`: a warp's
  int count;

  template <typename Block>
  GPU_CODE void operator()(Block& block) const {
    const auto& piece = Tile::piece_of(pieces, count, block);
    const Index first = (static_cast<Index>(block.x()) - piece.first) * Tile::kOutputs;
    block.each_apart([&](unsigned thread, Own& own) {
      GPU_UNROLL for (int n = 0; n < kTokens / 8; ++n)
        GPU_UNROLL for (int i = 0; i < 4; ++i) own.sum[n][i] = own.total[n][i] = 0;
      load<0>(thread, own, piece, first, 0);
      load<1>(thread, own, piece, first, kSteps * kStep);
    });
    for (Index at = 0; at < share; at += 2 * kSteps * kStep) {
      turn<0>(block, piece, first, at);
      turn<1>(block, piece, first, at + kSteps * kStep);
    }
    Tile::store(block, piece, first, tokens, [](Own& own) -> auto& { return own.total; });
  }

 private:
  /// Where the warp's step at `at` of its share begins; behind the end where there is none.
  GPU_CODE Index step_of(unsigned thread, Index at) const { return at < share ? static_cast<Index>(thread / 32) * share + at : end; }

  /// Multiplies what slot kSlot has and fills it again, while the other's loads are under way.
  template <int kSlot, typename Block>
  GPU_CODE void turn(Block& block, const Piece& piece, Index first, Index at) const {
    GPU_UNROLL for (int s = 0; s < kSteps; ++s) {
      GPU_UNROLL for (int j = 0; j < 4; ++j)
        GPU_UNROLL for (int n = 0; n < kTokens / 8; ++n) {
          block.each_apart([&](unsigned, Own& own) {
            GPU_UNROLL for (int i = 0; i < 2; ++i) {
              own.a[2 * i] = widen_e4m3_pair(own.low[kSlot][s].item[j] >> (16 * i) & 0xffff);
              own.a[2 * i + 1] = widen_e4m3_pair(own.high[kSlot][s].item[j] >> (16 * i) & 0xffff);
              own.b[i] = widen_e4m3_pair(own.x[kSlot][s][n].item[j] >> (16 * i) & 0xffff);
            }
          });
          mma_bf16(block, [n](Own& own) -> MmaShares { return {own.sum[n], own.a, own.b}; });
        }
      block.each_apart([&](unsigned thread, Own& own) {
        const auto k = step_of(thread, at + s * kStep);
        if (k >= end) return;                                   // nothing was summed
        float by_w[2], by_x[kTokens / 8][2];
        const Index last = piece.outputs - 1;
        GPU_UNROLL for (int half = 0; half < 2; ++half) {
          const Index row = first + Tile::output_of(thread, 2 * half);
          by_w[half] = piece.scales[(piece.first_row + (row < last ? row : last)) / kScaleBlock * piece.scale_pitch + k / kScaleBlock];
        }
        GPU_UNROLL for (int n = 0; n < kTokens / 8; ++n)
          GPU_UNROLL for (int i = 0; i < 2; ++i) {
            const Index token = Tile::token_of(thread, n, i);
            by_x[n][i] = x_scales[k / kScaleBlock * x_scale_pitch + (token < tokens ? token : tokens - 1)];
          }
        GPU_UNROLL for (int n = 0; n < kTokens / 8; ++n)
          GPU_UNROLL for (int i = 0; i < 4; ++i) {
            own.total[n][i] += own.sum[n][i] * (by_x[n][i % 2] * by_w[i / 2]);
            own.sum[n][i] = 0;
          }
      });
    }
    block.each_apart([&](unsigned thread, Own& own) { load<kSlot>(thread, own, piece, first, at + 2 * kSteps * kStep); });
  }

  template <int kSlot>
  GPU_CODE void load(unsigned thread, Own& own, const Piece& piece, Index first, Index at) const {
    const Index row = first + thread % 32 / 4, last = piece.outputs - 1;  // rows behind the last are not stored
    const auto* const low = piece.w + (row < last ? row : last) * piece.w_stride;
    const auto* const high = piece.w + (row + 8 < last ? row + 8 : last) * piece.w_stride;
    GPU_UNROLL for (int s = 0; s < kSteps; ++s) {
      const auto k = step_of(thread, at + s * kStep) + static_cast<Index>(thread % 4) * 16;
      const bool there = k >= begin && k < end;
      own.low[kSlot][s] = there ? load_once(low + (k - begin)) : Words{};
      own.high[kSlot][s] = there ? load_once(high + (k - begin)) : Words{};
      GPU_UNROLL for (int n = 0; n < kTokens / 8; ++n) {
        const Index token = n * 8 + thread % 32 / 4;
        own.x[kSlot][s][n] = there ? *reinterpret_cast<const Words*>(x + (token < tokens ? token : tokens - 1) * x_stride + (k - begin)) : Words{};
      }
    }
  }
};

template <int kTokens>
void start(StreamView on, const ScaledRows& x, std::span<const ScaledViews> all) {
  using Kernel = ThinScaled<kTokens>;
  constexpr Index kRound = Kernel::Tile::kWarps * Kernel::kStep;
  const auto end = x.first + x.numbers.columns;
  const Kernel kernel{{}, x.numbers.data, x.scales, x.numbers.rows, x.numbers.stride, x.scale_pitch, x.first, end, (end + kRound - 1) / kRound * Kernel::kStep, 0};
  Kernel::Tile::start(on, kernel, all, [](const ScaledWeight& w) -> typename Kernel::Piece { return {{}, w.numbers.data, w.scales, w.numbers.stride, w.scale_pitch, w.first_row}; });
}

}  // namespace

bool is_thin(const ScaledRows& x, const ScaledWeight& w) {
  constexpr int kChunk = 16;
  return x.numbers.rows > 0 && x.numbers.rows <= kThinRows && x.first % kChunk == 0 && in_packs(x.numbers, kChunk) && in_packs(w.numbers, kChunk);
}

void thin_scaled_linears(StreamView on, const ScaledRows& x, std::span<const ScaledViews> all) {
  for (const auto& [w, bias, out] : all) {
    check_scaled(x, w);
    check_linear(x.numbers, w.numbers, bias, out);
    shard::require(is_thin(x, w), shard::Code::Device, [&] { return fmt::format("device: {} rows of fp8 are not few rows in packs", x.numbers.rows); });
  }
  x.numbers.rows <= 8 ? start<8>(on, x, all) : start<16>(on, x, all);
}

}  // namespace gpu
