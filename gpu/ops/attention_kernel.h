// What the ways of attention share: where a block's query lies, which keys it sees, what becomes of a score.
#pragma once

#include "gpu/ops/attention.h"
#include "gpu/ops/numbers.h"

namespace gpu {

struct AttentionScalars {
  std::int64_t batch, length, heads, ratio, first_head, key_size, value_size, window;
  float scale, softcap;
  bool off_by_one;
  Numbers sinks;

  GPU_CODE std::int64_t key_head(std::int64_t head) const { return (first_head + head) / ratio; }
  /// The first key that a query sees; the last is itself.
  GPU_CODE std::int64_t first_key(std::int64_t query) const { return window && query >= window ? query - window + 1 : 0; }
  GPU_CODE bool has_sink() const { return off_by_one || sinks.given(); }
  GPU_CODE float sink(std::int64_t head) const { return sinks.given() ? sinks[head] : 0.0f; }
  GPU_CODE float capped(float score) const { return softcap != 0 ? softcap * tanhf(score / softcap) : score; }
  /// A product of q and k in T as the CPU makes a score of it.
  template <typename T>
  GPU_CODE float score(float product) const {
    return capped(rounded<T>(rounded<T>(product) * scale));
  }
};

/// Towards a maximum that may be −∞: nothing was seen then.
GPU_CODE float weight_towards(float from, float to) { return from == to ? 1.0f : expf(from - to); }

inline AttentionScalars attention_scalars(const lm::AttentionShape& s, const View& sinks) {
  shard::require(
      s.batch > 0 && s.length > 0 && s.heads > 0 && s.ratio > 0 && s.key_size > 0 && s.value_size > 0 && s.first_head >= 0 && s.window >= 0,
      shard::Code::Device, [] { return "device: attention over nothing"; });
  shard::require(!sinks || sinks.rows * sinks.columns == s.heads, shard::Code::Device,
                 [&] { return fmt::format("device: {} sinks for {} heads", sinks.rows * sinks.columns, s.heads); });
  return {s.batch,
          s.length,
          s.heads,
          s.ratio,
          s.first_head,
          s.key_size,
          s.value_size,
          s.window,
          static_cast<float>(s.scale),
          static_cast<float>(s.softcap),
          s.off_by_one,
          numbers(sinks)};
}

/// Refuses views that are not what the shape says.
inline void check_attention(const lm::AttentionShape& s, const View& q, const View& k, const View& v, const View& out) {
  const auto rows = s.batch * s.length, key_heads = (s.first_head + s.heads - 1) / s.ratio + 1;
  const auto fits = [&](const View& view, std::int64_t columns) { return view.rows == rows && view.columns >= columns && view.type == q.type; };
  shard::require(
      fits(q, s.heads * s.key_size) && fits(k, key_heads * s.key_size) && fits(v, key_heads * s.value_size) && fits(out, s.heads * s.value_size),
      shard::Code::Device, [&] {
        return fmt::format("device: attention of {} heads over {} rows: q [{}, {}], k [{}, {}], v [{}, {}] do not fit", s.heads, rows, q.rows,
                           q.columns, k.rows, k.columns, v.rows, v.columns);
      });
}

}  // namespace gpu
