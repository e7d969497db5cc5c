// Scores, softmax and the weighted sum of values, for blocks of queries of one head at a time.
#include "lm/cpu/kernel.h"
#include "lm/cpu/numbers.h"
#include "lm/cpu/workers.h"
#include "lm/cpu/ops.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace lm::cpu {
namespace {

constexpr Index kQueries = 48;
constexpr Index kLanes = 32;

Index padded(Index n) { return (n + kLanes - 1) / kLanes * kLanes; }

SHARD_CLONES void scale_row(float* x, Index n, float factor, bool bf16) {
  if (bf16)
    for (Index i = 0; i < n; ++i) x[i] = cpu::round_bf16(cpu::round_bf16(x[i]) * factor);
  else
    for (Index i = 0; i < n; ++i) x[i] *= factor;
}
/// x ← e^(x − shift); the sum.
SHARD_CLONES float exp_row(float* x, Index n, float shift) {
  for (Index i = 0; i < n; ++i) x[i] = cpu::exp_f32(x[i] - shift);
  float lanes[16] = {};
  Index i = 0;
  for (; i + 16 <= n; i += 16)
    for (int l = 0; l < 16; ++l) lanes[l] += x[i + l];
  float sum = 0;
  for (const auto lane : lanes) sum += lane;
  for (; i < n; ++i) sum += x[i];
  return sum;
}

SHARD_CLONES void divide_row(float* x, Index n, float sum, bool bf16) {
  for (Index i = 0; i < n; ++i) x[i] /= sum;
  if (bf16)
    for (Index i = 0; i < n; ++i) x[i] = cpu::round_bf16(x[i]);
}

/// The keys of one key head as [key_size][keys], its values as [keys][value_size], both padded with zeros.
struct HeadPanels {
  std::vector<float> keys, values;
};

}  // namespace

Tensor attention(const Context& on, const AttentionShape& shape, const Tensor& q, const Tensor& k, const Tensor& v, const Weight& sinks) {
  const auto length = shape.length, wide = padded(length), deep = padded(shape.value_size);
  const auto key_heads = (shape.first_head + shape.heads - 1) / shape.ratio + 1;
  std::vector<HeadPanels> panels(static_cast<std::size_t>(shape.batch * key_heads));
  cpu::run_on_workers(panels.size(), on.threads, [&](std::size_t task) {
    const auto b = static_cast<Index>(task) / key_heads, head = static_cast<Index>(task) % key_heads;
    auto& mine = panels[task];
    mine.keys.assign(static_cast<std::size_t>(shape.key_size * wide), 0.0f);
    mine.values.assign(static_cast<std::size_t>(length * deep), 0.0f);
    for (Index j = 0; j < length; ++j) {
      const auto* key = k.row(b * length + j) + head * shape.key_size;
      for (Index d = 0; d < shape.key_size; ++d) mine.keys[static_cast<std::size_t>(d * wide + j)] = key[d];
      const auto* value = v.row(b * length + j) + head * shape.value_size;
      std::copy(value, value + shape.value_size, mine.values.data() + j * deep);
    }
  }, on.stop);

  Tensor out(q.rows(), shape.heads * shape.value_size);
  const auto blocks = (length + kQueries - 1) / kQueries;
  struct Scratch {
    std::vector<float> scores, sums;
  };
  const auto& kernel = cpu::products();
  const bool bf16 = rounds_to_bf16(on.compute);
  const auto factor = static_cast<float>(shape.scale), cap = static_cast<float>(shape.softcap);
  cpu::run_on_workers(static_cast<std::size_t>(shape.batch * shape.heads * blocks), on.threads, [&](std::size_t task) {
    const auto first = static_cast<Index>(task) % blocks * kQueries, head = static_cast<Index>(task) / blocks % shape.heads,
               b = static_cast<Index>(task) / blocks / shape.heads;
    const auto queries = std::min(kQueries, length - first);
    const auto& mine = panels[static_cast<std::size_t>(b * key_heads + (shape.first_head + head) / shape.ratio)];
    const auto lo = shape.window ? std::max<Index>(0, first - shape.window + 1) / kLanes * kLanes : 0;
    const auto hi = std::min(wide, padded(first + queries)), keys = hi - lo;
    thread_local Scratch work;
    work.scores.resize(static_cast<std::size_t>(kQueries * wide));
    work.sums.resize(static_cast<std::size_t>(kQueries * deep));
    kernel.f32(q.row(b * length + first) + head * shape.key_size, q.columns(), mine.keys.data() + lo, wide, work.scores.data(), keys, queries,
               keys, shape.key_size, false);
    for (Index i = 0; i < queries; ++i) {
      auto* row = work.scores.data() + i * keys;
      const auto at = first + i, from = shape.window ? std::max<Index>(0, at - shape.window + 1) - lo : 0, count = at + 1 - lo - from;
      auto* seen = row + from;
      scale_row(seen, count, factor, bf16);
      if (cap != 0)
        for (Index j = 0; j < count; ++j) seen[j] = cap * std::tanh(seen[j] / cap);
      auto top = cpu::max_of(seen, count);
      const auto sink = sinks ? sinks.at(0, head) : 0.0f;
      const bool extra = sinks || shape.off_by_one;
      if (extra) top = std::max(top, sink);
      auto sum = exp_row(seen, count, top);
      if (extra) sum += cpu::exp_f32(sink - top);
      divide_row(seen, count, sum, bf16);
      std::fill(row, seen, 0.0f);
      std::fill(seen + count, row + keys, 0.0f);
    }
    const auto rows = std::min(hi, length) - lo;
    kernel.f32(work.scores.data(), keys, mine.values.data() + lo * deep, deep, work.sums.data(), deep, queries, deep, rows, false);
    for (Index i = 0; i < queries; ++i) {
      auto* to = out.row(b * length + first + i) + head * shape.value_size;
      const auto* from = work.sums.data() + i * deep;
      for (Index d = 0; d < shape.value_size; ++d) to[d] = bf16 ? cpu::round_bf16(from[d]) : from[d];
    }
  }, on.stop);
  return out;
}

}  // namespace lm::cpu
