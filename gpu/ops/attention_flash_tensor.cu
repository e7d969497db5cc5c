// Flash attention in bf16 on tensor cores: four warps have sixteen queries each; scores and outputs stay in registers, exponentials are
// powers of two. The values of a tile arrive while its scores are made, the next tile's keys while its values are summed.
#include "gpu/ops/attention_flash.h"
#include "gpu/tensor_core.h"

namespace gpu {
namespace {

using Index = std::int64_t;

constexpr float kLog2E = 1.4426950408889634f;

/// kKey, kValue: lanes of a head, filled up with zeros to a multiple of 16.
template <int kKey, int kValue>
struct FlashTensor {
  static constexpr int kQueries = 64, kKeys = 64;
  static constexpr unsigned kThreads = 128;
  static constexpr int kKeyPitch = kKey + 8, kValuePitch = kValue + 8;  // an odd number of 16 bytes: eight rows lie in all banks
  struct Shared {
    alignas(16) Bf16 q[kQueries][kKeyPitch];
    alignas(16) Bf16 k[kKeys][kKeyPitch];
    alignas(16) Bf16 v[kKeys][kValuePitch];
  };
  struct Own {
    float s[kKeys / 8][4], o[kValue / 8][4];
    std::uint32_t a[4], b[4];
    float top[2], next[2], sum[2];  ///< of rows t/4 and t/4 + 8 of the warp's; the sum over this thread's columns
  };
  AttentionScalars a;
  const Bf16* q;
  const Bf16* k;
  const Bf16* v;
  Bf16* out;
  Index q_stride, k_stride, v_stride, out_stride;

  template <typename Block>
  GPU_CODE void operator()(Block& block) const {
    auto& s = block.shared();
    const Index pairs = a.batch * a.heads, tiles = (a.length + kQueries - 1) / kQueries;
    const Index b = block.x() % pairs / a.heads, head = block.x() % pairs % a.heads,
                start = (tiles - 1 - block.x() / pairs) * kQueries;  // the longest first
    const Index stop = start + kQueries < a.length ? start + kQueries : a.length, key_head = a.key_head(head), row = b * a.length;
    const auto* const keys = k + row * k_stride + key_head * a.key_size;
    const auto* const values = v + row * v_stride + key_head * a.value_size;
    const auto first = a.first_key(start) / kKeys * kKeys;
    block.each_apart([&](unsigned thread, Own& own) {
      load<kKey>(thread, q + row * q_stride + head * a.key_size, q_stride, start, a.key_size, s.q);
      load<kKey>(thread, keys, k_stride, first, a.key_size, s.k);
      GPU_UNROLL for (int n = 0; n < kValue / 8; ++n)
        GPU_UNROLL for (int i = 0; i < 4; ++i) own.o[n][i] = 0;
      GPU_UNROLL for (int i = 0; i < 2; ++i) own.top[i] = lowest(), own.sum[i] = 0;
    });
    for (Index at = first; at < stop; at += kKeys) {
      block.each([&](unsigned, Own&) { copy_async_wait(); });  // the keys are there, and nobody needs the values before
      block.each_apart([&](unsigned thread, Own&) { load<kValue>(thread, values, v_stride, at, a.value_size, s.v); });
      make_scores(block);
      soften(block, start, at);
      block.each([&](unsigned, Own&) { copy_async_wait(); });
      if (at + kKeys < stop) block.each_apart([&](unsigned thread, Own&) { load<kKey>(thread, keys, k_stride, at + kKeys, a.key_size, s.k); });
      add_values(block);
    }
    GPU_UNROLL for (int i = 0; i < 2; ++i) quad_sum(block, [i](Own& own) -> float& { return own.sum[i]; });
    block.each_apart([&](unsigned thread, Own& own) {
      GPU_UNROLL for (int i = 0; i < 2; ++i) {
        const Index query = start + row_of(thread) + 8 * i;
        if (query >= a.length) continue;
        const float factor = finishing_factor(a, head, own.top[i] * unit(), own.sum[i]);
        auto* const to = out + (row + query) * out_stride + head * a.value_size;
        GPU_UNROLL for (int n = 0; n < kValue / 8; ++n) {
          const int lane = n * 8 + column_of(thread);
          if (lane < a.value_size) *reinterpret_cast<std::uint32_t*>(to + lane) = pack_bf16(own.o[n][2 * i] * factor, own.o[n][2 * i + 1] * factor);
        }
      }
    });
  }

 private:
  GPU_CODE static int row_of(unsigned thread) { return static_cast<int>(thread / 32 * 16 + thread % 32 / 4); }
  GPU_CODE static int column_of(unsigned thread) { return static_cast<int>(thread % 4 * 2); }

  template <int kWidth, int kRows>
  GPU_CODE void load(unsigned thread, const Bf16* from, Index stride, Index first, Index width, Bf16 (&to)[kRows][kWidth + 8]) const {
    constexpr int kChunks = kWidth / 8;
    for (int i = static_cast<int>(thread); i < kRows * kChunks; i += kThreads) {
      const int r = i / kChunks, lane = i % kChunks * 8;
      const bool there = first + r < a.length && lane < width;
      copy_async(&to[r][lane], there ? from + (first + r) * stride + lane : from, there);
    }
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

  /// What a score is multiplied by for its exponent: products are kept as they are, capped scores are final.
  GPU_CODE float unit() const { return a.softcap != 0 ? 1.0f : a.scale; }

  /// Scores become exponentials towards the running maximum; what was summed before shrinks to it.
  template <typename Block>
  GPU_CODE void soften(Block& block, Index start, Index at) const {
    const bool whole = at + kKeys <= start + 1 && at >= a.first_key(start + kQueries - 1);  // every query sees every key
    const float scale = unit() * kLog2E;
    block.each_apart([&](unsigned thread, Own& own) {
      if (a.softcap != 0)
        GPU_UNROLL for (int n = 0; n < kKeys / 8; ++n)
          GPU_UNROLL for (int i = 0; i < 4; ++i) own.s[n][i] = a.capped(own.s[n][i] * a.scale);
      if (!whole)
        GPU_UNROLL for (int n = 0; n < kKeys / 8; ++n)
          GPU_UNROLL for (int i = 0; i < 4; ++i) {
            const Index query = start + row_of(thread) + i / 2 * 8, key = at + n * 8 + column_of(thread) + i % 2;
            if (key > query || key < a.first_key(query)) own.s[n][i] = lowest();
          }
      GPU_UNROLL for (int i = 0; i < 2; ++i) own.next[i] = own.top[i];
      GPU_UNROLL for (int n = 0; n < kKeys / 8; ++n)
        GPU_UNROLL for (int i = 0; i < 4; ++i) own.next[i / 2] = larger(own.next[i / 2], own.s[n][i]);
    });
    GPU_UNROLL for (int i = 0; i < 2; ++i) quad_max(block, [i](Own& own) -> float& { return own.next[i]; });
    block.each_apart([&](unsigned, Own& own) {
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

  template <typename Block>
  GPU_CODE void add_values(Block& block) const {
    auto& s = block.shared();
    GPU_UNROLL for (int key = 0; key < kKeys; key += 16) {
      block.each_apart([&](unsigned, Own& own) {  // two tiles of scores are a fragment of the next product
        GPU_UNROLL for (int i = 0; i < 4; ++i) own.a[i] = pack_bf16(own.s[key / 8 + i / 2][i % 2 * 2], own.s[key / 8 + i / 2][i % 2 * 2 + 1]);
      });
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

template <int kKey, int kValue>
bool run(StreamView on, const AttentionScalars& a, const View& q, const View& k, const View& v, const View& out) {
  using Kernel = FlashTensor<kKey, kValue>;
  const auto tiles = blocks_for(static_cast<std::uint64_t>(a.length), Kernel::kQueries);
  launch(on, {tiles * static_cast<std::uint64_t>(a.batch * a.heads)},
         Kernel{a, elements<const Bf16>(q), elements<const Bf16>(k), elements<const Bf16>(v), elements<Bf16>(out), q.stride, k.stride, v.stride,
                out.stride});
  return true;
}

}  // namespace

bool flash_on_tensor_cores(StreamView on, const AttentionScalars& a, const View& q, const View& k, const View& v, const View& out) {
  const auto in_chunks = [](const View& view) {
    return view.type == shard::DType::BF16 && view.stride % 8 == 0 && reinterpret_cast<std::uintptr_t>(view.data) % 16 == 0;
  };
  if (!in_chunks(q) || !in_chunks(k) || !in_chunks(v) || !in_chunks(out) || a.key_size % 8 || a.value_size % 8) return false;
  if (!(a.scale > 0)) return false;  // the largest product would not be the largest score
  const auto fits = [&](std::int64_t key, std::int64_t value) { return a.key_size <= key && a.value_size <= value; };
  if (fits(64, 64)) return run<64, 64>(on, a, q, k, v, out);
  if (fits(96, 96)) return run<96, 96>(on, a, q, k, v, out);
  if (fits(128, 128)) return run<128, 128>(on, a, q, k, v, out);
  if (fits(192, 128)) return run<192, 128>(on, a, q, k, v, out);
  if (fits(256, 256)) return run<256, 256>(on, a, q, k, v, out);
  return false;
}

}  // namespace gpu
