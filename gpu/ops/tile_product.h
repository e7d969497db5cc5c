// A block's tile of x·wᵀ through shared memory, in f32 whatever the operands are stored as.
#pragma once

#include "gpu/ops/numbers.h"

namespace gpu {

/// Element (row, k) lies `row·row_stride + k·k_stride` behind the first.
struct Operand {
  Numbers data;
  std::int64_t rows = 0, row_stride = 0, k_stride = 1;

  GPU_CODE Operand from(std::int64_t row) const {
    auto out = *this;
    out.data.data += row * row_stride * item();
    out.rows -= row;
    return out;
  }
  GPU_CODE Operand behind(std::int64_t elements) const {
    auto out = *this;
    out.data.data += elements * item();
    return out;
  }

 private:
  GPU_CODE std::int64_t item() const {
    return data.type == shard::DType::F32 ? 4 : data.type == shard::DType::F8E4M3 || data.type == shard::DType::F8E5M2 ? 1 : 2;
  }
};

/// The last expert with tiles[expert] ≤ tile: whose rows that tile has.
GPU_CODE int expert_of(const std::int32_t* tiles, int experts, std::int32_t tile) {
  int expert = 0, above = experts;
  while (above - expert > 1) {
    const auto middle = (expert + above) / 2;
    if (tiles[middle] <= tile) expert = middle;
    else above = middle;
  }
  return expert;
}

struct TileProduct {
  static constexpr int kRows = 64, kColumns = 64, kDepth = 16;
  static constexpr unsigned kThreads = 256;
  struct Shared {
    float x[kDepth][kRows + 4], w[kDepth][kColumns + 4];
  };
  struct Own {
    float sum[4][4];
  };

  /// The first kRows of x by the first kColumns of w over `depth`; done(row, column, sum) for those there are.
  template <typename Block, typename Done>
  GPU_CODE static void run(Block& block, const Operand& x, const Operand& w, std::int64_t depth, Done done) {
    block.each_apart([&](unsigned, Own& own) {
      for (auto& row : own.sum)
        for (auto& sum : row) sum = 0;
    });
    for (std::int64_t at = 0; at < depth; at += kDepth) {
      block.each([&](unsigned thread, Own&) {
        load(thread, x, at, depth, block.shared().x);
        load(thread, w, at, depth, block.shared().w);
      });
      block.each([&](unsigned thread, Own& own) {
        const auto& s = block.shared();
        for (int k = 0; k < kDepth; ++k)
          for (int i = 0; i < 4; ++i)
            for (int j = 0; j < 4; ++j) own.sum[i][j] += s.x[k][thread / 16 + 16 * i] * s.w[k][thread % 16 + 16 * j];
      });
    }
    block.each_apart([&](unsigned thread, Own& own) {
      for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) {
          const std::int64_t row = thread / 16 + 16 * i, column = thread % 16 + 16 * j;
          if (row < x.rows && column < w.rows) done(row, column, own.sum[i][j]);
        }
    });
  }

 private:
  /// Neighbouring threads take neighbouring elements, whichever axis that is.
  template <int kPitch>
  GPU_CODE static void load(unsigned thread, const Operand& from, std::int64_t at, std::int64_t depth, float (&to)[kDepth][kPitch]) {
    constexpr int kCount = kPitch - 4;
    const bool along_k = from.k_stride == 1;
    for (unsigned i = thread; i < kCount * kDepth; i += kThreads) {
      const auto row = along_k ? i / kDepth : i % kCount, k = along_k ? i % kDepth : i / kCount;
      to[k][row] = row < from.rows && at + k < depth ? from.data[row * from.row_stride + (at + k) * from.k_stride] : 0.0f;
    }
  }
};

}  // namespace gpu
