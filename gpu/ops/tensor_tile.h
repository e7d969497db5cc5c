// A block's tile of x·wᵀ in bf16 on tensor cores, with the interface of TileProduct. While one slice of the depth is multiplied the next
// arrives.
#pragma once

#include "gpu/ops/tile_product.h"
#include "gpu/tensor_core.h"

namespace gpu {

struct TensorTile {
  static constexpr int kRows = 64, kColumns = 128, kDepth = 64, kPitch = kDepth + 8;  // an odd number of 16 bytes: eight rows lie in all banks
  static constexpr unsigned kThreads = 128;                                           // each warp has all rows and 32 columns
  struct Shared {
    alignas(16) Bf16 x[2][kRows][kPitch];
    alignas(16) Bf16 w[2][kColumns][kPitch];
  };
  struct Own {
    float sum[4][4][4];
    std::uint32_t a[4][4], b[4];
  };

  /// Operands of bf16 with k_stride 1.
  template <typename Block, typename Done>
  GPU_CODE static void run(Block& block, const Operand& x, const Operand& w, std::int64_t depth, Done done) {
    auto& s = block.shared();
    const auto load = [&](unsigned thread, std::int64_t at) {
      const auto slot = at / kDepth % 2;
      load_rows(thread, x, at, depth, s.x[slot]);
      load_rows(thread, w, at, depth, s.w[slot]);
    };
    block.each_apart([&](unsigned thread, Own& own) {
      GPU_UNROLL for (int m = 0; m < 4; ++m)
        GPU_UNROLL for (int n = 0; n < 4; ++n)
          GPU_UNROLL for (int i = 0; i < 4; ++i) own.sum[m][n][i] = 0;
      load(thread, 0);
    });
    for (std::int64_t at = 0; at < depth; at += kDepth) {
      block.each([](unsigned, Own&) { copy_async_wait(); });  // this slice is there, and nobody reads the one before
      block.each_apart([&](unsigned thread, Own&) {
        if (at + kDepth < depth) load(thread, at + kDepth);
      });
      multiply(block, s.x[at / kDepth % 2], s.w[at / kDepth % 2]);
    }
    block.each_apart([&](unsigned thread, Own& own) {
      GPU_UNROLL for (int m = 0; m < 4; ++m)
        GPU_UNROLL for (int n = 0; n < 4; ++n)
          GPU_UNROLL for (int i = 0; i < 4; ++i) {
            const std::int64_t row = m * 16 + static_cast<int>(thread % 32 / 4) + i / 2 * 8,
                               column = static_cast<int>(thread / 32) * 32 + n * 8 + static_cast<int>(thread % 4) * 2 + i % 2;
            if (row < x.rows && column < w.rows) done(row, column, own.sum[m][n][i]);
          }
    });
  }

 protected:
  template <int kCount>
  GPU_CODE static void load_rows(unsigned thread, const Operand& from, std::int64_t at, std::int64_t depth, Bf16 (&to)[kCount][kPitch]) {
    constexpr int kChunks = kDepth / 8;
    const auto* const data = reinterpret_cast<const Bf16*>(from.data.data);
    // Nothing is read there, but the address must be one that could be.
    const auto* const nowhere = reinterpret_cast<const Bf16*>(reinterpret_cast<std::uintptr_t>(data) / 16 * 16);
    for (int i = static_cast<int>(thread); i < kCount * kChunks; i += kThreads) {
      const int row = i / kChunks, lane = i % kChunks * 8;
      const auto k = at + lane;
      const auto* const chunk = data + row * from.row_stride + k;
      const bool there = row < from.rows && k < depth;
      if (!there || (k + 8 <= depth && reinterpret_cast<std::uintptr_t>(chunk) % 16 == 0)) {
        copy_async(&to[row][lane], there ? chunk : nowhere, there);
      } else {  // an odd end, or rows that start anywhere
        for (int j = 0; j < 8; ++j) to[row][lane + j] = k + j < depth ? chunk[j] : Bf16{0};
      }
    }
  }

  template <typename Block>
  GPU_CODE static void multiply(Block& block, const Bf16 (&x)[kRows][kPitch], const Bf16 (&w)[kColumns][kPitch]) {
    GPU_UNROLL for (int k = 0; k < kDepth; k += 16) {
      GPU_UNROLL for (int m = 0; m < 4; ++m)
        load_matrices<false>(block, [&](unsigned thread, Own& own) -> MatrixShares {
          return {own.a[m], &x[m * 16 + static_cast<int>(thread % 16)][k + static_cast<int>(thread % 32 / 16) * 8]};
        });
      GPU_UNROLL for (int n = 0; n < 4; n += 2) {
        load_matrices<false>(block, [&](unsigned thread, Own& own) -> MatrixShares {
          const int lane = static_cast<int>(thread % 32);
          return {own.b, &w[static_cast<int>(thread / 32) * 32 + n * 8 + lane / 16 * 8 + lane % 8][k + lane / 8 % 2 * 8]};
        });
        GPU_UNROLL for (int m = 0; m < 4; ++m) {
          mma_bf16(block, [m, n](Own& own) -> MmaShares { return {own.sum[m][n], own.a[m], own.b}; });
          mma_bf16(block, [m, n](Own& own) -> MmaShares { return {own.sum[m][n + 1], own.a[m], own.b + 2}; });
        }
      }
    }
  }
};

}  // namespace gpu
