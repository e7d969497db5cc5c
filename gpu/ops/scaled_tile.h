// A block's tile of x·wᵀ where both sides are e4m3 with scales: their numbers are exact in bf16 and meet on tensor cores; the sum of each slice of
// the depth, whose numbers share their scales, is multiplied by those and added in f32.
#pragma once

#include "gpu/ops/numbers.h"
#include "gpu/ops/tensor_tile.h"
#include "lm/scaled_blocks.h"

namespace gpu {

using lm::kScaleBlock;

/// Rows of e4m3. Lane k of the depth lies in block (first + k)/128.
struct ScaledOperand {
  const std::byte* numbers = nullptr;
  std::int64_t rows = 0, stride = 0;

  GPU_CODE ScaledOperand from(std::int64_t row) const { return {numbers + row * stride, rows - row, stride}; }
};

/// Two neighbours as bf16, which holds them exactly.
GPU_CODE std::uint32_t widen_e4m3_pair(std::uint32_t pair) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  std::uint32_t halves;
  float low, high;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(static_cast<std::uint16_t>(pair)));
  asm("{.reg .f16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}" : "=f"(low), "=f"(high) : "r"(halves));
  return pack_bf16(low, high);
#else
  return shard::widen<shard::kE4M3>(static_cast<std::uint8_t>(pair)) >> 16 | (shard::widen<shard::kE4M3>(static_cast<std::uint8_t>(pair >> 8)) & 0xffff0000u);
#endif
}

struct ScaledTile : TensorTile {
  struct Own : TensorTile::Own {  // its sums are those of a slice
    float total[4][4][4];
  };

  /// The first kRows of x by the first kColumns of w over `depth` lanes, lane 0 being `first` < 128 lanes behind a block's start; x_scale(row, block)
  /// and w_scale(column, block) are asked for rows and columns that are there. done(row, column, sum) for those.
  template <typename Block, typename XScale, typename WScale, typename Done>
  GPU_CODE static void run(Block& block, const ScaledOperand& x, const ScaledOperand& w, std::int64_t depth, int first, XScale x_scale, WScale w_scale, Done done) {
    auto& s = block.shared();
    const auto end = first + depth;      // in lanes counted from the block's start
    const auto load = [&](unsigned thread, std::int64_t at) {
      const auto slot = at / kDepth % 2;
      load_widened(thread, x, at, first, end, s.x[slot]);
      load_widened(thread, w, at, first, end, s.w[slot]);
    };
    block.each_apart([&](unsigned thread, Own& own) {
      GPU_UNROLL for (int m = 0; m < 4; ++m)
        GPU_UNROLL for (int n = 0; n < 4; ++n)
          GPU_UNROLL for (int i = 0; i < 4; ++i) own.sum[m][n][i] = own.total[m][n][i] = 0;
      load(thread, 0);
    });
    for (std::int64_t at = 0; at < end; at += kDepth) {
      block.each([](unsigned, Own&) {});  // this slice is there, and nobody reads the one before
      block.each_apart([&](unsigned thread, Own&) {
        if (at + kDepth < end) load(thread, at + kDepth);
      });
      multiply(block, s.x[at / kDepth % 2], s.w[at / kDepth % 2]);
      block.each_apart([&](unsigned thread, Own& own) {
        const auto number = at / kScaleBlock;
        float factor[4][2];
        GPU_UNROLL for (int n = 0; n < 4; ++n)
          GPU_UNROLL for (int i = 0; i < 2; ++i) {
            const auto column = column_of(thread, n, i);
            factor[n][i] = column < w.rows ? w_scale(column, number) : 0.0f;
          }
        GPU_UNROLL for (int m = 0; m < 4; ++m)
          GPU_UNROLL for (int half = 0; half < 2; ++half) {
            const auto row = row_of(thread, m, 2 * half);
            const float by = row < x.rows ? x_scale(row, number) : 0.0f;
            GPU_UNROLL for (int n = 0; n < 4; ++n)
              GPU_UNROLL for (int i = 0; i < 2; ++i) {
                auto& sum = own.sum[m][n][2 * half + i];
                own.total[m][n][2 * half + i] += sum * (by * factor[n][i]);
                sum = 0;
              }
          }
      });
    }
    block.each_apart([&](unsigned thread, Own& own) {
      GPU_UNROLL for (int m = 0; m < 4; ++m)
        GPU_UNROLL for (int n = 0; n < 4; ++n)
          GPU_UNROLL for (int i = 0; i < 4; ++i) {
            const auto row = row_of(thread, m, i), column = column_of(thread, n, i);
            if (row < x.rows && column < w.rows) done(row, column, own.total[m][n][i]);
          }
    });
  }

 private:
  /// Of number i in a thread's share.
  GPU_CODE static std::int64_t row_of(unsigned thread, int m, int i) { return m * 16 + static_cast<int>(thread % 32 / 4) + i / 2 * 8; }
  GPU_CODE static std::int64_t column_of(unsigned thread, int n, int i) { return static_cast<int>(thread / 32) * 32 + n * 8 + static_cast<int>(thread % 4) * 2 + i % 2; }

  /// Lanes [at, at + kDepth), those in [first, end) from the rows and zeros for the others.
  template <int kCount>
  GPU_CODE static void load_widened(unsigned thread, const ScaledOperand& from, std::int64_t at, std::int64_t first, std::int64_t end, Bf16 (&to)[kCount][kPitch]) {
    constexpr int kChunk = 16, kChunks = kDepth / kChunk;
    for (int i = static_cast<int>(thread); i < kCount * kChunks; i += kThreads) {
      const int row = i / kChunks, lane = i % kChunks * kChunk;
      const auto k = at + lane;
      const auto* const chunk = from.numbers + row * from.stride + (k - first);
      Words got{};
      if (row < from.rows && k + kChunk > first && k < end) {
        if (k >= first && k + kChunk <= end && reinterpret_cast<std::uintptr_t>(chunk) % 16 == 0) {
          got = *reinterpret_cast<const Words*>(chunk);
        } else {  // an end, or rows that start anywhere
          for (int j = 0; j < kChunk; ++j)
            if (k + j >= first && k + j < end) got.item[j / 4] |= static_cast<std::uint32_t>(chunk[j]) << (j % 4 * 8);
        }
      }
      Words wide[2];
      GPU_UNROLL for (int j = 0; j < 8; ++j) wide[j / 4].item[j % 4] = widen_e4m3_pair(got.item[j / 2] >> (j % 2 * 16) & 0xffff);
      GPU_UNROLL for (int j = 0; j < 2; ++j) store_pack(&to[row][lane + 8 * j], std::bit_cast<Pack<Bf16, 8>>(wide[j]));
    }
  }
};

}  // namespace gpu
