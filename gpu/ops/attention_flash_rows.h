// Scores to weights in registers, for both kernels on tensor cores: a warp has sixteen queries, its scores and sums lie as fragments of products do
// (gpu/tensor_core.h). Exponentials are powers of two.
#pragma once

#include "gpu/ops/attention_flash.h"
#include "gpu/tensor_core.h"

namespace gpu {

template <int kKeys, int kValue>
struct FlashRows {
  using Index = std::int64_t;

  struct Own {
    float s[kKeys / 8][4], o[kValue / 8][4];
    float top[2], next[2], sum[2];  ///< of rows t/4 and t/4 + 8 of the warp's; the sum over this thread's columns
  };

  AttentionScalars a;
  Index start;  ///< the block's first query

  GPU_CODE static int row_of(unsigned thread) { return static_cast<int>(thread / 32 * 16 + thread % 32 / 4); }
  GPU_CODE static int column_of(unsigned thread) { return static_cast<int>(thread % 4 * 2); }

  GPU_CODE static void begin(Own& own) {
    GPU_UNROLL for (int n = 0; n < kValue / 8; ++n)
      GPU_UNROLL for (int i = 0; i < 4; ++i) own.o[n][i] = 0;
    GPU_UNROLL for (int i = 0; i < 2; ++i) own.top[i] = lowest(), own.sum[i] = 0;
  }

  /// Scores of the keys from `at` become exponentials towards the running maximum; what was summed before shrinks to it.
  template <typename Block>
  GPU_CODE void soften(Block& block, Index at) const {
    const float scale = unit() * kLog2E;
    block.each_apart([&](unsigned thread, auto& own) {
      if (a.softcap != 0)
        GPU_UNROLL for (int n = 0; n < kKeys / 8; ++n)
          GPU_UNROLL for (int i = 0; i < 4; ++i) own.s[n][i] = a.capped(own.s[n][i] * a.scale);
      const Index first = start + thread / 32 * 16;
      if (at + kKeys > first + 1 || at < a.first_key(first + 15))  // not every query of the warp sees every key
        GPU_UNROLL for (int n = 0; n < kKeys / 8; ++n)
          GPU_UNROLL for (int i = 0; i < 4; ++i) {
            const Index query = start + row_of(thread) + i / 2 * 8, key = at + n * 8 + column_of(thread) + i % 2;
            if (key > query || key < a.first_key(query)) own.s[n][i] = lowest();
          }
      GPU_UNROLL for (int i = 0; i < 2; ++i) own.next[i] = own.top[i];
      GPU_UNROLL for (int n = 0; n < kKeys / 8; ++n)
        GPU_UNROLL for (int i = 0; i < 4; ++i) own.next[i / 2] = larger(own.next[i / 2], own.s[n][i]);
    });
    GPU_UNROLL for (int i = 0; i < 2; ++i) quad_max(block, [i](auto& own) -> float& { return own.next[i]; });
    block.each_apart([&](unsigned, auto& own) {
      GPU_UNROLL for (int i = 0; i < 2; ++i) {
        const float shift = own.next[i] == lowest() ? 0.0f : own.next[i] * scale;
        const float factor = own.top[i] == own.next[i] ? 1.0f : power_of_two(own.top[i] * scale - shift);
        own.top[i] = own.next[i];
        float sum = 0;
        GPU_UNROLL for (int n = 0; n < kKeys / 8; ++n)
          GPU_UNROLL for (int j = 2 * i; j < 2 * i + 2; ++j) sum += own.s[n][j] = power_of_two(own.s[n][j] * scale - shift);
        own.sum[i] = own.sum[i] * factor + sum;
        if (factor != 1)
          GPU_UNROLL for (int n = 0; n < kValue / 8; ++n)
            GPU_UNROLL for (int j = 2 * i; j < 2 * i + 2; ++j) own.o[n][j] *= factor;  // rare in later tiles
      }
    });
  }

  /// Two tiles of scores are a fragment of the next product: that of sixteen keys from the tile's `key`.
  GPU_CODE static void pack(const Own& own, int key, std::uint32_t (&to)[4]) {
    GPU_UNROLL for (int i = 0; i < 4; ++i) to[i] = pack_bf16(own.s[key / 8 + i / 2][i % 2 * 2], own.s[key / 8 + i / 2][i % 2 * 2 + 1]);
  }

  /// Sums divided by their weights, to rows that begin at `out` for the sequence's first query.
  template <typename Block>
  GPU_CODE void finish(Block& block, Index head, Bf16* out, Index out_stride) const {
    GPU_UNROLL for (int i = 0; i < 2; ++i) quad_sum(block, [i](auto& own) -> float& { return own.sum[i]; });
    block.each_apart([&](unsigned thread, auto& own) {
      GPU_UNROLL for (int i = 0; i < 2; ++i) {
        const Index query = start + row_of(thread) + 8 * i;
        if (query >= a.length) continue;
        const float factor = finishing_factor(a, head, own.top[i] * unit(), own.sum[i]);
        auto* const to = out + query * out_stride + head * a.value_size;
        GPU_UNROLL for (int n = 0; n < kValue / 8; ++n) {
          const int lane = n * 8 + column_of(thread);
          if (lane < a.value_size) *reinterpret_cast<std::uint32_t*>(to + lane) = pack_bf16(own.o[n][2 * i] * factor, own.o[n][2 * i + 1] * factor);
        }
      }
    });
  }

 private:
  static constexpr float kLog2E = 1.4426950408889634f;
  /// What a score is multiplied by for its exponent: products are kept as they are, capped scores are final.
  GPU_CODE float unit() const { return a.softcap != 0 ? 1.0f : a.scale; }
};

/// The longest tile of queries first, since it has the most keys.
struct FlashBlock {
  std::int64_t sequence, head, start, stop;
  GPU_CODE FlashBlock(const AttentionScalars& a, unsigned block, int queries) {
    const std::int64_t pairs = a.batch * a.heads, tiles = (a.length + queries - 1) / queries;
    sequence = block % pairs / a.heads;
    head = block % pairs % a.heads;
    start = (tiles - 1 - block / pairs) * queries;
    stop = start + queries < a.length ? start + queries : a.length;
  }
};

/// Whether the kernels on tensor cores take such operands: bf16 in whole chunks of 16 bytes. (By a factor that is not positive the largest product would not
/// be the largest score.)
inline bool tensor_cores_take(const AttentionScalars& a, const View& q, const View& k, const View& v, const View& out) {
  const auto in_chunks = [](const View& view) {
    return view.type == shard::DType::BF16 && view.stride % 8 == 0 && reinterpret_cast<std::uintptr_t>(view.data) % 16 == 0;
  };
  return in_chunks(q) && in_chunks(k) && in_chunks(v) && in_chunks(out) && a.key_size % 8 == 0 && a.value_size % 8 == 0 && a.scale > 0;
}

}  // namespace gpu
