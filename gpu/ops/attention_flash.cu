// A tile of queries against tiles of keys, with a running softmax, in f32: for f32, and for head sizes that tensor cores do not take.
#include "gpu/ops/attention_flash.h"

namespace gpu {
namespace {

using Index = std::int64_t;

/// Eight threads a query; each keeps every eighth lane of its output. kHead: the widest head.
template <int kHead>
struct Flash {
  static constexpr int kQueries = 32, kKeys = kHead > 128 ? 16 : 32, kTeam = 8;
  static constexpr unsigned kThreads = kQueries * kTeam;
  struct Shared {
    float q[kQueries][kHead + 1], k[kKeys][kHead + 1], v[kKeys][kHead + 1];
    float p[kQueries][kKeys + 1];
  };
  struct Own {
    float out[kHead / kTeam];
    float top, next, sum;
  };
  AttentionScalars a;
  Numbers q, k, v;
  Results out;
  Index q_stride, k_stride, v_stride, out_stride;

  template <typename Block>
  GPU_CODE void operator()(Block& block) const {
    auto& s = block.shared();
    const Index pairs = a.batch * a.heads, tiles = (a.length + kQueries - 1) / kQueries;
    const Index b = block.x() % pairs / a.heads, head = block.x() % pairs % a.heads,
                start = (tiles - 1 - block.x() / pairs) * kQueries;  // the longest first
    const Index stop = start + kQueries < a.length ? start + kQueries : a.length, key_head = a.key_head(head);
    block.each_apart([&](unsigned thread, Own& own) {
      load(thread, q, b, start, q_stride, head * a.key_size, a.key_size, s.q);
      GPU_UNROLL for (int i = 0; i < kHead / kTeam; ++i) own.out[i] = 0;
      own.top = lowest();
      own.sum = 0;
    });
    for (Index at = a.first_key(start) / kKeys * kKeys; at < stop; at += kKeys) {
      block.each([&](unsigned thread, Own&) {
        load(thread, k, b, at, k_stride, key_head * a.key_size, a.key_size, s.k);
        load(thread, v, b, at, v_stride, key_head * a.value_size, a.value_size, s.v);
      });
      block.each([&](unsigned thread, Own&) {
        const int row = static_cast<int>(thread) / kTeam;
        const auto first = a.first_key(start + row);
        float sum[kKeys / kTeam] = {};
        for (int d = 0; d < a.key_size; ++d) {
          const float x = s.q[row][d];
          GPU_UNROLL for (int i = 0; i < kKeys / kTeam; ++i) sum[i] += x * s.k[static_cast<int>(thread) % kTeam + i * kTeam][d];
        }
        GPU_UNROLL for (int i = 0; i < kKeys / kTeam; ++i) {
          const int j = static_cast<int>(thread) % kTeam + i * kTeam;
          s.p[row][j] = at + j >= first && at + j <= start + row ? a.capped(sum[i] * a.scale) : lowest();
        }
      });
      block.each([&](unsigned thread, Own& own) {
        own.next = own.top;
        const auto* const scores = s.p[thread / kTeam];
        for (int j = 0; j < kKeys; ++j) own.next = larger(own.next, scores[j]);
      });
      block.each([&](unsigned thread, Own& own) {
        const float shift = own.next == lowest() ? 0.0f : own.next;
        for (int j = static_cast<int>(thread) % kTeam; j < kKeys; j += kTeam) {
          auto& p = s.p[thread / kTeam][j];
          p = expf(p - shift);
        }
      });
      block.each([&](unsigned thread, Own& own) {
        const auto* const p = s.p[thread / kTeam];
        const float factor = weight_towards(own.top, own.next);
        own.top = own.next;
        own.sum *= factor;
        GPU_UNROLL for (int i = 0; i < kHead / kTeam; ++i) own.out[i] *= factor;
        for (int j = 0; j < kKeys; ++j) {
          own.sum += p[j];
          GPU_UNROLL for (int i = 0; i < kHead / kTeam; ++i) own.out[i] += p[j] * s.v[j][static_cast<int>(thread) % kTeam + i * kTeam];
        }
      });
    }
    block.each_apart([&](unsigned thread, Own& own) {
      const Index row = start + thread / kTeam;
      if (row >= a.length) return;
      const float factor = finishing_factor(a, head, own.top, own.sum);
      const auto to = (b * a.length + row) * out_stride + head * a.value_size;
      GPU_UNROLL for (int i = 0; i < kHead / kTeam; ++i) {
        const auto d = static_cast<int>(thread) % kTeam + i * kTeam;
        if (d < a.value_size) out.set(to + d, own.out[i] * factor);
      }
    });
  }

 private:
  /// Rows from `first` of a sequence; zeros behind its end and behind the head.
  template <int kRows>
  GPU_CODE void load(unsigned thread, const Numbers& from, Index b, Index first, Index stride, Index lane, Index width,
                     float (&to)[kRows][kHead + 1]) const {
    for (unsigned i = thread; i < kRows * kHead; i += kThreads) {
      const Index row = i / kHead, d = i % kHead;
      to[row][d] = first + row < a.length && d < width ? from[(b * a.length + first + row) * stride + lane + d] : 0.0f;
    }
  }
};

}  // namespace

void flash_attention(StreamView on, const lm::AttentionShape& shape, const View& q, const View& k, const View& v, const View& sinks,
                     const View& out) {
  check_attention(shape, q, k, v, out);
  const auto widest = std::max(shape.key_size, shape.value_size);
  shard::require(widest <= kMaxFlashHead, shard::Code::Device,
                 [&] { return fmt::format("device: heads of {}; flash attention takes at most {}", widest, kMaxFlashHead); });
  const auto scalars = attention_scalars(shape, sinks);
  if (flash_by_warpgroups(on, scalars, q, k, v, out) || flash_on_tensor_cores(on, scalars, q, k, v, out)) return;
  const auto run = [&]<int kHead>() {
    using Kernel = Flash<kHead>;
    const auto tiles = blocks_for(static_cast<std::uint64_t>(shape.length), Kernel::kQueries);
    launch(on, {tiles * static_cast<std::uint64_t>(shape.batch * shape.heads)},
           Kernel{scalars, numbers(q), numbers(k), numbers(v), results(out), q.stride, k.stride, v.stride, out.stride});
  };
  if (widest <= 64) run.template operator()<64>();
  else if (widest <= 128) run.template operator()<128>();
  else run.template operator()<256>();
}

}  // namespace gpu
