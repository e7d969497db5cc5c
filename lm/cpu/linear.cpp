// y = x·Wᵀ + b. Weights stay row-major as stored and are broadcast; activations are packed once, since they are the smaller side.
#include "lm/cpu/kernel.h"
#include "lm/cpu/numbers.h"
#include "lm/cpu/workers.h"
#include "lm/cpu/ops.h"
#include "libshard/error.h"

#include <algorithm>
#include <cstring>

namespace lm::cpu {
namespace {

using cpu::kPanel;

constexpr Index kRowBlock = 48;    // output features that one task takes: a multiple of every kernel's rows
constexpr Index kDepth = 512;      // of a panel that streams through L1 while the rows of a block pass: shorter ones store and load sums more often
constexpr Index kTokenBlock = 512;

SHARD_CLONES void widen_row(const std::byte* from, float* to, Index count) {
  for (Index i = 0; i < count; ++i) {
    std::uint16_t bits;
    std::memcpy(&bits, from + 2 * i, 2);
    to[i] = std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
  }
}

/// rows × depth of `w` from (row, at) as f32 in `into`, depth apart.
void load_f32(const Weight& w, Index row, Index rows, Index at, Index depth, float* into) {
  for (Index r = 0; r < rows; ++r) {
    const auto* from = w.data + static_cast<std::size_t>((row + r) * w.stride + at) * size_of(w.dtype);
    if (w.dtype == shard::DType::BF16) widen_row(from, into + r * depth, depth);
    else std::memcpy(into + r * depth, from, static_cast<std::size_t>(depth) * 4);
  }
}

/// The same as bf16 pairs, an odd end filled with zero.
void load_pairs(const Weight& w, Index row, Index rows, Index at, Index depth, std::uint32_t* into) {
  const auto pairs = (depth + 1) / 2;
  for (Index r = 0; r < rows; ++r) {
    const auto* from = w.data + static_cast<std::size_t>((row + r) * w.stride + at) * 2;
    if (depth % 2) into[r * pairs + pairs - 1] = 0;
    std::memcpy(into + r * pairs, from, static_cast<std::size_t>(depth) * 2);
  }
}

/// The next block of weights comes from memory while this one is multiplied.
void ask_ahead(const Weight& w, Index row, Index rows, Index at, Index depth) {
  if (depth <= 0) return;
  const auto item = size_of(w.dtype);
  for (Index r = 0; r < rows; ++r) {
    const auto* from = w.data + static_cast<std::size_t>((row + r) * w.stride + at) * item;
    for (std::size_t byte = 0; byte < static_cast<std::size_t>(depth) * item; byte += 64) __builtin_prefetch(from + byte, 0, 2);
  }
}

typedef float Eight __attribute__((vector_size(32), aligned(4), may_alias));

/// Eight rows of eight, turned, plus one number for each of the eight.
SHARD_INLINE void turn_eight(const float* c, Index width, const float* bias, float* out, Index stride, Index tokens) {
  Eight a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = *reinterpret_cast<const Eight*>(c + i * width);
  for (int i = 0; i < 4; ++i) {
    b[2 * i] = __builtin_shufflevector(a[2 * i], a[2 * i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    b[2 * i + 1] = __builtin_shufflevector(a[2 * i], a[2 * i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      a[i + 2 * j] = __builtin_shufflevector(b[i + j], b[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      a[i + 2 * j + 1] = __builtin_shufflevector(b[i + j], b[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  const auto added = *reinterpret_cast<const Eight*>(bias);
  for (Index i = 0; i < (tokens < 8 ? tokens : 8); ++i) {
    const auto low = a[i & 3], high = a[4 + (i & 3)];
    const auto row = i < 4 ? __builtin_shufflevector(low, high, 0, 1, 2, 3, 8, 9, 10, 11) : __builtin_shufflevector(low, high, 4, 5, 6, 7, 12, 13, 14, 15);
    *reinterpret_cast<Eight*>(out + i * stride) = row + added;
  }
}

/// out[t][r] = c[r·width + t] + bias[r], in squares that stay in L1.
SHARD_CLONES void turn_back(const float* c, Index width, const float* bias, Index rows, Index tokens, float* out, Index stride, bool rounded) {
  const auto even = rows / 8 * 8;
  for (Index t = 0; t < tokens; t += 8) {
    for (Index r = 0; r < even; r += 8) turn_eight(c + r * width + t, width, bias + r, out + t * stride + r, stride, tokens - t);
    for (Index i = t; i < (t + 8 < tokens ? t + 8 : tokens); ++i) {
      auto* to = out + i * stride;
      for (Index r = even; r < rows; ++r) to[r] = c[r * width + i] + bias[r];
      if (rounded)
        for (Index r = 0; r < rows; ++r) to[r] = cpu::round_bf16(to[r]);
    }
  }
}

/// One token's features as a column of bf16 pairs.
SHARD_CLONES void pack_pairs(const float* from, Index features, std::uint32_t* to) {
  for (Index i = 0; i < features / 2; ++i)
    to[i * kPanel] = shard::narrow<shard::kBF16>(std::bit_cast<std::uint32_t>(from[2 * i])) |
                     shard::narrow<shard::kBF16>(std::bit_cast<std::uint32_t>(from[2 * i + 1])) << 16;
  if (features % 2) to[features / 2 * kPanel] = shard::narrow<shard::kBF16>(std::bit_cast<std::uint32_t>(from[features - 1]));
}

struct Scratch {
  std::vector<float> w, c;
  std::vector<std::uint32_t> pairs;
};

}  // namespace

Packed::Packed(const Context& on, const Tensor& x) : tokens_(x.rows()), features_(x.columns()) {
  const auto panels = (tokens_ + kPanel - 1) / kPanel;
  const bool pairs = on.compute == Compute::Bf16 && cpu::products().bf16;
  const auto depth = pairs ? (features_ + 1) / 2 : features_;
  const auto words = static_cast<std::size_t>(panels * depth * kPanel);
  memory_ = take_buffer(words * 4);
  if (pairs) pairs_ = reinterpret_cast<std::uint32_t*>(memory_.get());
  else f32_ = reinterpret_cast<float*>(memory_.get());
  if (tokens_ % kPanel) std::memset(memory_.get() + static_cast<std::size_t>((panels - 1) * depth * kPanel) * 4, 0, static_cast<std::size_t>(depth * kPanel) * 4);
  parallel_ranges(on, panels, 1, [&](Index lo, Index hi) {
    for (Index p = lo; p < hi; ++p)
      for (Index t = 0; t < std::min(kPanel, tokens_ - p * kPanel); ++t) {
        const auto* from = x.row(p * kPanel + t);
        if (pairs) {
          pack_pairs(from, features_, pairs_ + p * depth * kPanel + t);
        } else {
          auto* to = f32_ + p * depth * kPanel + t;
          for (Index i = 0; i < features_; ++i) to[i * kPanel] = from[i];
        }
      }
  });
}

void linear(const Context& on, const Packed& x, const Weight& w, const Weight& bias, Tensor& out, Index column) {
  shard::require(w.columns == x.features_, shard::Code::Mismatch,
                 [&] { return fmt::format("model: a weight takes {} features; its input has {}", w.columns, x.features_); });
  const auto& kernel = cpu::products();
  const bool pairs = x.pairs_ && w.dtype == shard::DType::BF16;
  shard::require(pairs || !x.pairs_, shard::Code::Mismatch, [] { return "model: an f32 weight in a bf16 product"; });
  const auto features = x.features_, step = kDepth, token_blocks = (x.tokens_ + kTokenBlock - 1) / kTokenBlock;
  const auto row_blocks = (w.rows + kRowBlock - 1) / kRowBlock;
  cpu::run_on_workers(static_cast<std::size_t>(row_blocks * token_blocks), on.threads, [&](std::size_t task) {
    const auto row = static_cast<Index>(task) % row_blocks * kRowBlock, first = static_cast<Index>(task) / row_blocks * kTokenBlock;
    const auto rows = std::min(kRowBlock, w.rows - row), tokens = std::min(kTokenBlock, x.tokens_ - first);
    const auto panels = (tokens + kPanel - 1) / kPanel, width = panels * kPanel + 16;  // rows a power of two apart would share cache sets
    thread_local Scratch mine;
    mine.c.resize(static_cast<std::size_t>(kRowBlock * (kTokenBlock + 16)));
    mine.w.resize(pairs ? 0 : static_cast<std::size_t>(kRowBlock * step));
    mine.pairs.resize(pairs ? static_cast<std::size_t>(kRowBlock * step) : 0);
    const auto block = pairs ? 2 * step : step;
    for (Index at = 0; at < features; at += block) {
      const auto depth = std::min(block, features - at);
      const auto deep = (depth + 1) / 2;
      if (pairs) load_pairs(w, row, rows, at, depth, mine.pairs.data());
      else load_f32(w, row, rows, at, depth, mine.w.data());
      if (at + block < features) ask_ahead(w, row, rows, at + block, std::min(block, features - at - block));
      else if (const auto next = row + kRowBlock * static_cast<Index>(on.threads); next < w.rows)
        ask_ahead(w, next, std::min(kRowBlock, w.rows - next), 0, std::min(block, features));  // likely this thread's next task
      for (Index p = 0; p < panels; ++p) {
        const auto panel = first / kPanel + p;
        if (pairs)
          kernel.bf16(mine.pairs.data(), deep, x.pairs_ + (panel * ((features + 1) / 2) + at / 2) * kPanel, kPanel,
                      mine.c.data() + p * kPanel, width, rows, kPanel, deep, at > 0);
        else
          kernel.f32(mine.w.data(), depth, x.f32_ + (panel * features + at) * kPanel, kPanel, mine.c.data() + p * kPanel, width, rows,
                     kPanel, depth, at > 0);
      }
    }
    float added[kRowBlock];
    for (Index r = 0; r < rows; ++r) added[r] = bias ? bias.at(0, row + r) : 0.0f;
    turn_back(mine.c.data(), width, added, rows, tokens, out.row(first) + column + row, out.columns(), on.compute == Compute::Bf16);
  });
}

}  // namespace lm::cpu
