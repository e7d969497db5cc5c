// What the instructions do, at once: a missing fence or wait does not show here.
#pragma once

#include "gpu/warpgroup.h"

#include <cstring>

namespace gpu {

namespace emulated {

/// The bf16 at a place in a panel where chunks are not swapped.
inline float in_panel(const void* panel, std::uintptr_t offset) {
  auto place = reinterpret_cast<std::uintptr_t>(panel) + offset;
  place ^= (place >> 7 & 7) << 4;
  std::uint16_t bits;
  std::memcpy(&bits, reinterpret_cast<const void*>(place), 2);
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

/// d[64][N] += a·b of one group; share(t) is thread t's.
template <int N, typename Share>
void add_product(const float (&a)[64][16], const float (&b)[16][N], Share share) {
  for (unsigned t = 0; t < 128; ++t)
    for (int n = 0; n < N / 8; ++n)
      for (unsigned i = 0; i < 4; ++i) {
        const auto row = t / 32 * 16 + t % 32 / 4 + i / 2 * 8, column = static_cast<unsigned>(n) * 8 + t % 4 * 2 + i % 2;
        float sum = 0;
        for (unsigned k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
        share(t)[n][i] += sum;
      }
}

}  // namespace emulated

template <int N, typename Block, typename Of>
void group_product(Block& block, Of of) {
  for (unsigned group = 0; group < Block::kThreads / 128; ++group) {
    const GroupShares first = of(block.own(group * 128), group);
    float a[64][16], b[16][N];
    for (std::uintptr_t k = 0; k < 16; ++k) {
      for (std::uintptr_t row = 0; row < 64; ++row) a[row][k] = emulated::in_panel(first.a, row * 128 + k * 2);
      for (std::uintptr_t row = 0; row < N; ++row) b[k][row] = emulated::in_panel(first.b, row * 128 + k * 2);
    }
    for (unsigned t = 0; t < 128; ++t) {
      const GroupShares own = of(block.own(group * 128 + t), group);
      if (own.fresh) std::memset(own.d, 0, sizeof(float) * N / 2);
    }
    emulated::add_product<N>(a, b, [&](unsigned t) { return of(block.own(group * 128 + t), group).d; });
  }
}

template <int N, typename Block, typename Of>
void group_product_turned(Block& block, Of of) {
  for (unsigned group = 0; group < Block::kThreads / 128; ++group) {
    float a[64][16], b[16][N];
    const GroupTurnedShares first = of(block.own(group * 128));
    for (std::uintptr_t k = 0; k < 16; ++k)
      for (std::uintptr_t n = 0; n < N; ++n) b[k][n] = emulated::in_panel(first.b, n / 64 * first.step + k * 128 + n % 64 * 2);
    for (unsigned t = 0; t < 128; ++t) {
      const GroupTurnedShares own = of(block.own(group * 128 + t));
      const unsigned row = t / 32 * 16 + t % 32 / 4, pair = 2 * (t % 4);
      for (unsigned i = 0; i < 4; ++i) emulated::widen_pair(own.a[i], a[row + i % 2 * 8][pair + i / 2 * 8], a[row + i % 2 * 8][pair + i / 2 * 8 + 1]);
    }
    emulated::add_product<N>(a, b, [&](unsigned t) { return of(block.own(group * 128 + t)).d; });
  }
}

template <int N, int M, typename Block, typename Of>
void group_begin(Block&, Of) {}
template <typename Block>
void group_commit(Block&) {}
template <int N, int M, typename Block, typename Of>
void group_wait(Block&, Of) {}
inline void show_copies() {}

}  // namespace gpu
