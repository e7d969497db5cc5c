// y = x·Wᵀ + b. A block of weight rows is turned into panels that stay near while all tokens pass; activations are broadcast as they lie.
#include "lm/cpu/kernel.h"
#include "lm/cpu/numbers.h"
#include "lm/cpu/workers.h"
#include "lm/cpu/ops.h"
#include "libshard/error.h"
#include "lm/scaled_blocks.h"

#include <algorithm>
#include <cstring>
#include <map>

namespace lm::cpu {
namespace {

using cpu::kPanel;

constexpr Index kRowBlock = 64;     // output features that one task takes: whole panels
constexpr Index kDepth = 512;       // words of a panel: shorter ones store and load sums more often, longer ones leave the caches
constexpr Index kTokenBlock = 512;  // that one task takes
constexpr Index kGroup = 48;        // tokens that meet all panels of a block before the next ones come: a multiple of every kernel's rows

typedef std::uint32_t Eight __attribute__((vector_size(32), aligned(2), may_alias));
typedef std::uint16_t Halves __attribute__((vector_size(16), aligned(2), may_alias));

/// What a product takes of a weight in 32 bits: a pair of bf16, an f32, or an f32 of one bf16.
enum class Word { Pair, Same, Widened };

template <Word kind>
SHARD_INLINE Eight eight_words(const std::byte* from) {
  if constexpr (kind == Word::Widened) return __builtin_convertvector(*reinterpret_cast<const Halves*>(from), Eight) << 16;
  else return *reinterpret_cast<const Eight*>(from);
}

/// Eight rows of eight words become eight columns of `into`, whose rows are panels wide.
template <Word kind>
SHARD_INLINE void turn_eight(const std::byte* from, std::size_t stride, std::uint32_t* into) {
  Eight a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = eight_words<kind>(from + static_cast<std::size_t>(i) * stride);
  for (int i = 0; i < 4; ++i) {
    b[2 * i] = __builtin_shufflevector(a[2 * i], a[2 * i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    b[2 * i + 1] = __builtin_shufflevector(a[2 * i], a[2 * i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      a[i + 2 * j] = __builtin_shufflevector(b[i + j], b[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      a[i + 2 * j + 1] = __builtin_shufflevector(b[i + j], b[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  for (int i = 0; i < 4; ++i) {
    *reinterpret_cast<Eight*>(into + i * kPanel) = __builtin_shufflevector(a[i], a[4 + i], 0, 1, 2, 3, 8, 9, 10, 11);
    *reinterpret_cast<Eight*>(into + (4 + i) * kPanel) = __builtin_shufflevector(a[i], a[4 + i], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

/// A panel of at most kPanel rows from `from`, turned: into[k][r], zero beyond the last row. `numbers` of each row; an odd one has zero for a partner.
template <Word kind>
SHARD_INLINE void turn_panel(const std::byte* from, std::size_t stride, Index rows, Index numbers, std::uint32_t* into) {
  constexpr std::size_t kBytes = kind == Word::Widened ? 2 : 4;
  const auto words = kind == Word::Pair ? numbers / 2 : numbers, whole = words / 8 * 8;
  const auto even = rows / 8 * 8;
  for (Index r = 0; r < even; r += 8)
    for (Index k = 0; k < whole; k += 8) turn_eight<kind>(from + static_cast<std::size_t>(r) * stride + static_cast<std::size_t>(k) * kBytes, stride, into + k * kPanel + r);
  const auto all = kind == Word::Pair ? (numbers + 1) / 2 : numbers;
  for (Index r = 0; r < kPanel; ++r)
    for (Index k = r < even ? whole : 0; k < all; ++k) {
      std::uint32_t bits = 0;
      if (r < rows) std::memcpy(&bits, from + static_cast<std::size_t>(r) * stride + static_cast<std::size_t>(k) * kBytes, k < words ? kBytes : 2);
      into[k * kPanel + r] = kind == Word::Widened ? bits << 16 : bits;
    }
}

/// `rows` rows of `numbers` numbers as panels of `words` rows, one after another.
SHARD_CLONES void turn(const std::byte* from, std::size_t stride, Word kind, Index rows, Index numbers, Index words, std::uint32_t* into) {
  for (Index r = 0; r < rows; r += kPanel, from += kPanel * stride, into += words * kPanel) {
    const auto some = rows - r < kPanel ? rows - r : kPanel;
    if (kind == Word::Pair) turn_panel<Word::Pair>(from, stride, some, numbers, into);
    else if (kind == Word::Same) turn_panel<Word::Same>(from, stride, some, numbers, into);
    else turn_panel<Word::Widened>(from, stride, some, numbers, into);
  }
}

SHARD_CLONES void finish_row(const float* sums, const float* bias, Index n, bool rounded, float* out) {
  if (rounded)
    for (Index i = 0; i < n; ++i) out[i] = cpu::round_bf16(sums[i] + bias[i]);
  else
    for (Index i = 0; i < n; ++i) out[i] = sums[i] + bias[i];
}

SHARD_CLONES void narrow_row(const float* from, Index count, std::uint16_t* to) {
  for (Index i = 0; i < count; ++i) to[i] = static_cast<std::uint16_t>(shard::narrow<shard::kBF16>(std::bit_cast<std::uint32_t>(from[i])));
}

/// Words from one row of a matrix to the next: an odd number of cache lines, so that rows do not share cache sets.
Index pitch(Index words) { return ((words + 15) / 16 | 1) * 16; }

struct Scratch {
  std::shared_ptr<std::byte> weights = take_buffer(kRowBlock * kDepth * 4), sums = take_buffer(static_cast<std::size_t>(kTokenBlock * pitch(kRowBlock)) * 4);
};

}  // namespace

/// What is made of the input for linears in e4m3.
struct Packed::Scaled {
  Context on;
  const Tensor& x;
  std::map<Index, Packed> made;       // by the first lane's place in its block
};

Packed::Packed(const Context& on, const Tensor& x) : tokens_(x.rows()), features_(x.columns()) {
  if (on.compute == Compute::Fp8) scaled_ = std::make_shared<Scaled>(Scaled{on, x, {}});
  const bool pairs = rounds_to_bf16(on.compute) && cpu::products().bf16;
  const auto words = pairs ? (features_ + 1) / 2 : features_, row = pitch(words);
  memory_ = take_buffer(static_cast<std::size_t>(tokens_ * row) * 4);
  if (pairs) pairs_ = reinterpret_cast<std::uint32_t*>(memory_.get());
  else f32_ = reinterpret_cast<float*>(memory_.get());
  parallel_ranges(on, tokens_, 16, [&](Index lo, Index hi) {
    for (Index t = lo; t < hi; ++t) {
      if (!pairs) {
        std::memcpy(f32_ + t * row, x.row(t), static_cast<std::size_t>(features_) * 4);
        continue;
      }
      auto* to = pairs_ + t * row;
      if (features_ % 2) std::memset(to + words - 1, 0, 4);  // the last number's partner
      narrow_row(x.row(t), features_, reinterpret_cast<std::uint16_t*>(to));
    }
  });
}

const Packed& Packed::scaled(Index first) const {
  const auto known = scaled_->made.find(first);
  if (known != scaled_->made.end()) return known->second;
  const Context wide{Compute::F32, scaled_->on.threads, scaled_->on.stop};
  auto rounded = scaled_->x.clone();
  parallel_ranges(wide, tokens_, 16, [&](Index lo, Index hi) {
    for (Index t = lo; t < hi; ++t) round_e4m3_blocks(rounded.row(t), features_, first);
  });
  return scaled_->made.emplace(first, Packed(wide, rounded)).first->second;
}

void linear(const Context& on, const Packed& x, const Linear& by, Tensor& out) {
  if (!by.scales) return linear(on, x, by.weight, by.bias, out);
  const auto& w = by.weight;
  const auto& scaled = x.scaled(w.first_column % kScaleBlock);
  constexpr Index kRows = 1024;       // widened at a time
  Tensor wide(std::min(kRows, w.rows), w.columns);
  for (Index first = 0; first < w.rows; first += kRows) {
    const auto rows = std::min(kRows, w.rows - first);
    parallel_ranges(on, rows, 16, [&](Index lo, Index hi) { widen_scaled(w, by.scales, first + lo, first + hi, wide.row(lo)); });
    linear(on, scaled, {{}, wide.data(), shard::DType::F32, rows, w.columns, w.columns}, by.bias ? by.bias.column_range(first, rows) : Weight{}, out, first);
  }
}

void linear(const Context& on, const Packed& x, const Weight& w, const Weight& bias, Tensor& out, Index column) {
  shard::require(w.columns == x.features_, shard::Code::Mismatch,
                 [&] { return fmt::format("model: a weight takes {} features; its input has {}", w.columns, x.features_); });
  const auto& kernel = cpu::products();
  const bool pairs = x.pairs_ && w.dtype == shard::DType::BF16;
  shard::require(pairs || !x.pairs_, shard::Code::Mismatch, [] { return "model: an f32 weight in a bf16 product"; });
  const auto kind = pairs ? Word::Pair : w.dtype == shard::DType::BF16 ? Word::Widened : Word::Same;
  const auto item = size_of(w.dtype), stride = static_cast<std::size_t>(w.stride) * item;
  const auto features = x.features_, numbers_a_word = Index{pairs ? 2 : 1}, block = kDepth * numbers_a_word;
  const auto length = pitch((features + numbers_a_word - 1) / numbers_a_word);
  const auto token_blocks = (x.tokens_ + kTokenBlock - 1) / kTokenBlock, row_blocks = (w.rows + kRowBlock - 1) / kRowBlock;
  cpu::run_on_workers(static_cast<std::size_t>(row_blocks * token_blocks), on.threads, [&](std::size_t task) {
    const auto row = static_cast<Index>(task) % row_blocks * kRowBlock, first = static_cast<Index>(task) / row_blocks * kTokenBlock;
    const auto rows = std::min(kRowBlock, w.rows - row), tokens = std::min(kTokenBlock, x.tokens_ - first);
    const auto width = pitch(rows);
    thread_local Scratch mine;
    auto* const turned = reinterpret_cast<std::uint32_t*>(mine.weights.get());
    auto* const sums = reinterpret_cast<float*>(mine.sums.get());
    for (Index at = 0; at < features; at += block) {
      const auto numbers = std::min(block, features - at), words = (numbers + numbers_a_word - 1) / numbers_a_word, done = at / numbers_a_word;
      turn(w.data + static_cast<std::size_t>(row) * stride + static_cast<std::size_t>(at) * item, stride, kind, rows, numbers, words, turned);
      for (Index t = 0; t < tokens; t += kGroup) {
        const auto some = std::min(kGroup, tokens - t);
        for (Index r = 0; r < rows; r += kPanel) {
          const auto columns = std::min(kPanel, (rows - r + 15) / 16 * 16);
          auto* to = sums + t * width + r;
          const auto* panel = turned + r * words;
          if (pairs) kernel.bf16(x.pairs_ + (first + t) * length + done, length, panel, kPanel, to, width, some, columns, words, at > 0);
          else kernel.f32(x.f32_ + (first + t) * length + done, length, reinterpret_cast<const float*>(panel), kPanel, to, width, some, columns, words, at > 0);
        }
      }
    }
    float added[kRowBlock];
    for (Index r = 0; r < rows; ++r) added[r] = bias ? bias.at(0, row + r) : 0.0f;
    for (Index t = 0; t < tokens; ++t) finish_row(sums + t * width, added, rows, rounds_to_bf16(on.compute), out.row(first + t) + column + row);
  }, on.stop);
}

}  // namespace lm::cpu
