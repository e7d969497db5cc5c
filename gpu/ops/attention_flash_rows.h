// Scores to weights in registers, for both kernels on tensor cores: a warp has sixteen queries, its scores and sums lie as fragments of products do
// (gpu/tensor_core.h). Exponentials are powers of two.
#pragma once

#include "gpu/ops/attention_flash.h"
#include "gpu/tensor_core.h"

namespace gpu {

template <int kKeys, int kValue>
struct FlashRows {
  struct Own {
    float s[kKeys / 8][4], o[kValue / 8][4];
    float top[2], next[2], sum[2];  ///< of rows t/4 and t/4 + 8 of the warp's; the sum over this thread's columns
  };

  AttentionScalars a;
  int start;  ///< the block's first query

  GPU_CODE static int row_of(unsigned thread) { return static_cast<int>(thread / 32 * 16 + thread % 32 / 4); }
  GPU_CODE static int column_of(unsigned thread) { return static_cast<int>(thread % 4 * 2); }

  GPU_CODE static void begin(Own& own) {
    GPU_UNROLL for (int n = 0; n < kValue / 8; ++n)
      GPU_UNROLL for (int i = 0; i < 4; ++i) own.o[n][i] = 0;
    GPU_UNROLL for (int i = 0; i < 2; ++i) own.top[i] = lowest(), own.sum[i] = 0;
  }

  /// Scores of the keys from `at` become exponentials towards the running maximum; what was summed before shrinks to it.
  template <typename Block>
  GPU_CODE void soften(Block& block, int at) const {
    const float scale = unit() * kLog2E;
    block.each_apart([&](unsigned thread, auto& own) {
      if (a.softcap != 0)
        GPU_UNROLL for (int n = 0; n < kKeys / 8; ++n)
          GPU_UNROLL for (int i = 0; i < 4; ++i) own.s[n][i] = a.capped(own.s[n][i] * a.scale);
      const int first = start + static_cast<int>(thread / 32) * 16, window = static_cast<int>(a.window);
      if (at + kKeys > first + 1 || (window && at + window <= first + 15)) {  // not every query of the warp sees every key
        const int query = start + row_of(thread) - at - column_of(thread);    // of this thread's columns the last that its first row sees
        GPU_UNROLL for (int n = 0; n < kKeys / 8; ++n)
          GPU_UNROLL for (int i = 0; i < 4; ++i) {
            const int last = query + i / 2 * 8, key = n * 8 + i % 2;
            if (key > last || (window && key <= last - window)) own.s[n][i] = lowest();
          }
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
  GPU_CODE void finish(Block& block, std::int64_t head, Bf16* out, std::int64_t out_stride) const {
    GPU_UNROLL for (int i = 0; i < 2; ++i) quad_sum(block, [i](auto& own) -> float& { return own.sum[i]; });
    block.each_apart([&](unsigned thread, auto& own) {
      GPU_UNROLL for (int i = 0; i < 2; ++i) {
        const int query = start + row_of(thread) + 8 * i;
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

/// What the kernels on tensor cores are made of.
struct FlashOperands {
  AttentionScalars a;
  const Bf16* q;
  const Bf16* k;
  const Bf16* v;
  Bf16* out;
  std::int64_t q_stride, k_stride, v_stride, out_stride;
};

/// A block's head and tile of queries: the longest tile first, since it has the most keys.
struct FlashBlock {
  std::int64_t head;
  int start, stop;  ///< queries
  int first_key;    ///< of the first tile of kKeys
  const Bf16 *q, *k, *v;  ///< the head's lanes of the sequence's first row
  Bf16* out;        ///< the sequence's first row
  GPU_CODE FlashBlock(const FlashOperands& of, unsigned block, int queries, int keys) {
    const auto& a = of.a;
    const std::int64_t pairs = a.batch * a.heads, tiles = (a.length + queries - 1) / queries, row = block % pairs / a.heads * a.length;
    head = block % pairs % a.heads;
    start = static_cast<int>(tiles - 1 - block / pairs) * queries;
    stop = start + queries < a.length ? start + queries : static_cast<int>(a.length);
    first_key = static_cast<int>(a.first_key(start)) / keys * keys;
    const auto key_head = a.key_head(head);
    q = of.q + row * of.q_stride + head * a.key_size;
    k = of.k + row * of.k_stride + key_head * a.key_size;
    v = of.v + row * of.v_stride + key_head * a.value_size;
    out = of.out + row * of.out_stride;
  }
};

template <typename Kernel>
void launch_flash(StreamView on, const AttentionScalars& a, const View& q, const View& k, const View& v, const View& out) {
  const auto tiles = blocks_for(static_cast<std::uint64_t>(a.length), Kernel::kQueries);
  launch(on, {tiles * static_cast<std::uint64_t>(a.batch * a.heads)},
         Kernel{{a, elements<const Bf16>(q), elements<const Bf16>(k), elements<const Bf16>(v), elements<Bf16>(out), q.stride, k.stride, v.stride, out.stride}});
}

/// Copies of 16 bytes by kThreads threads: rows of a sequence from `first`, zeros behind its end and behind `width`; place(row, chunk) is where a chunk goes.
template <int kRows, int kChunks, int kThreads, typename Place>
GPU_CODE void load_rows(unsigned thread, const Bf16* from, std::int64_t stride, int first, int length, int width, Place place) {
  const auto* const tile = from + first * stride;
  const int pitch = static_cast<int>(stride);
  static_assert(kRows * kChunks % kThreads == 0);
  GPU_UNROLL for (int turn = 0; turn < kRows * kChunks / kThreads; ++turn) {
    const int i = turn * kThreads + static_cast<int>(thread), row = i / kChunks, chunk = i % kChunks;
    const bool there = first + row < length && chunk * 8 < width;
    copy_async(place(row, chunk), there ? tile + (row * pitch + chunk * 8) : from, there);
  }
}

/// Whether the kernels on tensor cores take such operands: bf16 in whole chunks of 16 bytes, of a size with which indices are ints. (By a factor that is not positive the largest product would not
/// be the largest score.)
inline bool tensor_cores_take(const AttentionScalars& a, const View& q, const View& k, const View& v, const View& out) {
  const auto in_chunks = [](const View& view) {
    return view.type == shard::DType::BF16 && view.stride % 8 == 0 && reinterpret_cast<std::uintptr_t>(view.data) % 16 == 0;
  };
  constexpr std::int64_t kMost = std::int64_t{1} << 24;  // places in a tile, and queries, are ints
  return in_chunks(q) && in_chunks(k) && in_chunks(v) && in_chunks(out) && a.key_size % 8 == 0 && a.value_size % 8 == 0 && a.scale > 0 &&
         a.length < kMost && a.window < kMost && q.stride < kMost && k.stride < kMost && v.stride < kMost;
}

}  // namespace gpu
