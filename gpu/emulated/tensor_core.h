// What the instructions do, one warp after another. Copies are done at once: a missing wait does not show here.
#pragma once

#include "gpu/tensor_core.h"
#include "libshard/error.h"
#include "libshard/float_bits.h"

#include <bit>
#include <cmath>
#include <cstring>

namespace gpu {

namespace emulated {

/// The bf16 numbers of a word.
inline void widen_pair(std::uint32_t word, float& low, float& high) {
  low = std::bit_cast<float>(word << 16);
  high = std::bit_cast<float>(word & 0xffff0000u);
}

template <typename Block, typename Of, typename Join>
void over_quads(Block& block, Of of, Join join) {
  for (unsigned first = 0; first < Block::kThreads; first += 4) {
    float all = of(block.own(first));
    for (unsigned t = 1; t < 4; ++t) all = join(all, of(block.own(first + t)));
    for (unsigned t = 0; t < 4; ++t) of(block.own(first + t)) = all;
  }
}

}  // namespace emulated

template <typename Block, typename Of>
void mma_bf16(Block& block, Of of) {
  for (unsigned warp = 0; warp < Block::kThreads; warp += 32) {
    float a[16][16], b[16][8];
    for (unsigned t = 0; t < 32; ++t) {
      const MmaShares m = of(block.own(warp + t));
      const unsigned row = t / 4, pair = 2 * (t % 4);
      for (unsigned i = 0; i < 4; ++i) emulated::widen_pair(m.a[i], a[row + i % 2 * 8][pair + i / 2 * 8], a[row + i % 2 * 8][pair + i / 2 * 8 + 1]);
      for (unsigned i = 0; i < 2; ++i) emulated::widen_pair(m.b[i], b[pair + i * 8][row], b[pair + i * 8 + 1][row]);
    }
    for (unsigned t = 0; t < 32; ++t) {
      const MmaShares m = of(block.own(warp + t));
      for (unsigned i = 0; i < 4; ++i) {
        float sum = 0;
        for (unsigned k = 0; k < 16; ++k) sum += a[t / 4 + i / 2 * 8][k] * b[k][2 * (t % 4) + i % 2];
        m.d[i] += sum;
      }
    }
  }
}

template <bool kTurned, typename Block, typename Of>
void load_matrices(Block& block, Of of) {
  for (unsigned warp = 0; warp < Block::kThreads; warp += 32) {
    std::uint16_t matrix[4][8][8];
    for (unsigned t = 0; t < 32; ++t) std::memcpy(matrix[t / 8][t % 8], of(warp + t, block.own(warp + t)).row, 16);
    for (unsigned t = 0; t < 32; ++t) {
      const MatrixShares m = of(warp + t, block.own(warp + t));
      for (unsigned i = 0; i < 4; ++i) {
        const unsigned row = t / 4, pair = 2 * (t % 4);
        const std::uint32_t low = kTurned ? matrix[i][pair][row] : matrix[i][row][pair],
                            high = kTurned ? matrix[i][pair + 1][row] : matrix[i][row][pair + 1];
        m.to[i] = low | high << 16;
      }
    }
  }
}

template <typename Block, typename Of>
void quad_max(Block& block, Of of) {
  emulated::over_quads(block, of, [](float a, float b) { return b > a ? b : a; });
}
template <typename Block, typename Of>
void quad_sum(Block& block, Of of) {
  emulated::over_quads(block, of, [](float a, float b) { return a + b; });
}

inline void copy_async(void* to, const void* from, bool there) {
  shard::require(reinterpret_cast<std::uintptr_t>(to) % 16 == 0 && reinterpret_cast<std::uintptr_t>(from) % 16 == 0, shard::Code::Device, [] { return "emulated device: an asynchronous copy of 16 bytes starts elsewhere"; });
  if (there) std::memcpy(to, from, 16);
  else std::memset(to, 0, 16);
}
inline void copy_async_wait() {}

inline float power_of_two(float x) { return std::exp2(x); }
inline std::uint32_t pack_bf16(float low, float high) {
  return shard::narrow<shard::kBF16>(std::bit_cast<std::uint32_t>(low)) | shard::narrow<shard::kBF16>(std::bit_cast<std::uint32_t>(high)) << 16;
}

}  // namespace gpu
