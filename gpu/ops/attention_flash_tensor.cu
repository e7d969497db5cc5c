// Flash attention in bf16 on tensor cores: four warps have sixteen queries each; scores and outputs stay in registers. The values of a tile arrive
// while its scores are made, the next tile's keys while its values are summed.
#include "gpu/ops/attention_flash_rows.h"

namespace gpu {
namespace {

using Index = std::int64_t;

/// kKey, kValue: lanes of a head, filled up with zeros to a multiple of 16.
template <int kKey, int kValue>
struct FlashTensor : FlashOperands {
  static constexpr int kQueries = 64, kKeys = 64;
  static constexpr unsigned kThreads = 128;
  static constexpr int kKeyPitch = kKey + 8, kValuePitch = kValue + 8;  // an odd number of 16 bytes: eight rows lie in all banks
  using Rows = FlashRows<kKeys, kValue>;
  struct Shared {
    alignas(16) Bf16 q[kQueries][kKeyPitch];
    alignas(16) Bf16 k[kKeys][kKeyPitch];
    alignas(16) Bf16 v[kKeys][kValuePitch];
  };
  struct Own : Rows::Own {
    std::uint32_t a[4], b[4];
  };
  template <typename Block>
  GPU_CODE void operator()(Block& block) const {
    auto& s = block.shared();
    const FlashBlock mine(*this, block.x(), kQueries, kKeys);
    const Rows rows{a, mine.start};
    block.each_apart([&](unsigned thread, Own& own) {
      load(thread, mine.q, q_stride, mine.start, a.key_size, s.q);
      load(thread, mine.k, k_stride, mine.first_key, a.key_size, s.k);
      Rows::begin(own);
    });
    for (int at = mine.first_key; at < mine.stop; at += kKeys) {
      block.each([&](unsigned, Own&) { copy_async_wait(); });  // the keys are there, and nobody needs the values before
      block.each_apart([&](unsigned thread, Own&) { load(thread, mine.v, v_stride, at, a.value_size, s.v); });
      make_scores(block);
      rows.soften(block, at);
      block.each([&](unsigned, Own&) { copy_async_wait(); });
      if (at + kKeys < mine.stop) block.each_apart([&](unsigned thread, Own&) { load(thread, mine.k, k_stride, at + kKeys, a.key_size, s.k); });
      add_values(block);
    }
    rows.finish(block, mine.head, mine.out, out_stride);
  }

 private:
  template <int kRows, int kPitch>
  GPU_CODE void load(unsigned thread, const Bf16* from, Index stride, int first, Index width, Bf16 (&to)[kRows][kPitch]) const {
    load_rows<kRows, (kPitch - 8) / 8, static_cast<int>(kThreads)>(thread, from, stride, first, static_cast<int>(a.length), static_cast<int>(width),
                                                                   [&](int row, int chunk) { return &to[row][chunk * 8]; });
  }

  template <typename Block>
  GPU_CODE void make_scores(Block& block) const {
    auto& s = block.shared();
    block.each_apart([&](unsigned, Own& own) {
      GPU_UNROLL for (int n = 0; n < kKeys / 8; ++n)
        GPU_UNROLL for (int i = 0; i < 4; ++i) own.s[n][i] = 0;
    });
    GPU_UNROLL for (int d = 0; d < kKey; d += 16) {
      load_matrices<false>(block, [&](unsigned thread, Own& own) -> MatrixShares {
        return {own.a, &s.q[thread / 32 * 16 + thread % 16][d + static_cast<int>(thread % 32 / 16) * 8]};
      });
      GPU_UNROLL for (int n = 0; n < kKeys / 8; n += 2) {
        load_matrices<false>(block, [&](unsigned thread, Own& own) -> MatrixShares {
          const auto lane = thread % 32;
          return {own.b, &s.k[n * 8 + static_cast<int>(lane / 16 * 8 + lane % 8)][d + static_cast<int>(lane / 8 % 2) * 8]};
        });
        mma_bf16(block, [n](Own& own) -> MmaShares { return {own.s[n], own.a, own.b}; });
        mma_bf16(block, [n](Own& own) -> MmaShares { return {own.s[n + 1], own.a, own.b + 2}; });
      }
    }
  }

  template <typename Block>
  GPU_CODE void add_values(Block& block) const {
    auto& s = block.shared();
    GPU_UNROLL for (int key = 0; key < kKeys; key += 16) {
      block.each_apart([&](unsigned, Own& own) { Rows::pack(own, key, own.a); });
      GPU_UNROLL for (int n = 0; n < kValue / 8; n += 2) {
        load_matrices<true>(block, [&](unsigned thread, Own& own) -> MatrixShares {
          const auto lane = thread % 32;
          return {own.b, &s.v[key + static_cast<int>(lane / 8 % 2 * 8 + lane % 8)][n * 8 + static_cast<int>(lane / 16) * 8]};
        });
        mma_bf16(block, [n](Own& own) -> MmaShares { return {own.o[n], own.a, own.b}; });
        mma_bf16(block, [n](Own& own) -> MmaShares { return {own.o[n + 1], own.a, own.b + 2}; });
      }
    }
  }
};

}  // namespace

bool flash_on_tensor_cores(StreamView on, const AttentionScalars& a, const View& q, const View& k, const View& v, const View& out) {
  if (!tensor_cores_take(a, q, k, v, out)) return false;
  const auto fits = [&](std::int64_t key, std::int64_t value) { return a.key_size <= key && a.value_size <= value; };
  if (fits(64, 64)) return launch_flash<FlashTensor<64, 64>>(on, a, q, k, v, out), true;
  if (fits(96, 96)) return launch_flash<FlashTensor<96, 96>>(on, a, q, k, v, out), true;
  if (fits(128, 128)) return launch_flash<FlashTensor<128, 128>>(on, a, q, k, v, out), true;
  if (fits(192, 128)) return launch_flash<FlashTensor<192, 128>>(on, a, q, k, v, out), true;
  if (fits(256, 256)) return launch_flash<FlashTensor<256, 256>>(on, a, q, k, v, out), true;
  return false;
}

}  // namespace gpu
