// Sixteen bytes a thread at a time; elements are looked at one by one only where those sixteen hold something.
#include "gpu/reshard/numbers.h"

#include "gpu/kernel.h"
#include "gpu/reshard/elements.h"
#include "libshard/element.h"

namespace gpu::reshard {
namespace {

using shard::DType;

/// Bytes of a part, its exponent's bits, and the largest number's successor (infinity, or NaN where there is none).
struct Look {
  unsigned size;
  std::uint64_t magnitude, special;
};
GPU_CODE Look look_of(DType part) {
  switch (part) {
    case DType::F64: return {8, ~std::uint64_t{0} >> 1, std::uint64_t{0x7ff} << 52};
    case DType::F32: return {4, 0x7fffffff, 0x7f800000};
    case DType::F16: return {2, shard::kF16.magnitude(), shard::kF16.infinity()};
    case DType::BF16: return {2, shard::kBF16.magnitude(), shard::kBF16.infinity()};
    case DType::F8E4M3: return {1, shard::kE4M3.magnitude(), shard::kE4M3.nan()};
    default: return {1, shard::kE5M2.magnitude(), shard::kE5M2.infinity()};
  }
}

/// Finds parts from `special` on in a word at once: their sums carry into the top bit. Of f64 the words at odd places tell.
struct Marks {
  std::uint32_t magnitude[2], add[2], top[2];

  GPU_CODE explicit Marks(const Look& look) {
    const auto half = std::uint64_t{1} << (8 * look.size - 1);
    const auto ones = look.size == 1 ? 0x01010101u : look.size == 2 ? 0x00010001u : 1u;
    const auto word = [&](std::uint64_t part) { return static_cast<std::uint32_t>(look.size == 8 ? part >> 32 : part) * ones; };
    for (unsigned odd = 0; odd < 2; ++odd) {
      const bool tells = odd || look.size < 8;
      magnitude[odd] = tells ? word(look.magnitude) : 0;
      add[odd] = tells ? word(half - look.special) : 0;
      top[odd] = tells ? word(half) : 0;
    }
  }
  GPU_CODE bool in(const Wide& sixteen) const {
    std::uint32_t carried = 0;
    GPU_UNROLL
    for (unsigned i = 0; i < 4; ++i) carried |= ((sixteen.word[i] & magnitude[i % 2]) + add[i % 2]) & top[i % 2];
    return carried != 0;
  }
};

GPU_CODE std::uint64_t load_part(const std::byte* from, unsigned size) {
  switch (size) {
    case 1: return load_as<std::uint8_t>(from);
    case 2: return load_as<std::uint16_t>(from);
    case 4: return load_as<std::uint32_t>(from);
    default: return load_as<std::uint64_t>(from);
  }
}

GPU_CODE unsigned parts_of(DType dtype) { return dtype == DType::C64 || dtype == DType::C128 ? 2 : 1; }

GPU_CODE unsigned size_of_part(DType part) {
  switch (part) {
    case DType::F64:
    case DType::I64:
    case DType::U64: return 8;
    case DType::F32:
    case DType::I32:
    case DType::U32: return 4;
    case DType::F16:
    case DType::BF16:
    case DType::I16:
    case DType::U16: return 2;
    default: return 1;
  }
}

struct Scan {
  static constexpr unsigned kThreads = 256, kEach = 4;
  struct Shared {};
  struct Own {
    unsigned long long nan, inf, before;
  };
  const ScanPiece* pieces;
  const std::byte* base;
  ScanCounts* results;

  template <typename Block>
  GPU_CODE void operator()(Block& block) const {
    const auto piece = pieces[block.x()];
    const auto part = shard::part_of(piece.dtype);
    const auto look = look_of(part);
    const Marks marks(look);
    const auto per_element = look.size * parts_of(piece.dtype);
    const auto count = [&](std::uint32_t at, Own& own) {
      for (unsigned i = 0; i < 16 && at + i < piece.bytes; i += look.size) {
        const auto magnitude = load_part(base + piece.at + at + i, look.size) & look.magnitude;
        if (magnitude < look.special) continue;
        const bool nan = magnitude > look.special || part == DType::F8E4M3;
        (nan ? own.nan : own.inf) += 1;
        const auto before = ~(piece.first + (at + i) / per_element);
        own.before = before > own.before ? before : own.before;
      }
    };
    block.each_apart([&](unsigned thread, Own& own) {
      own = {0, 0, 0};
      for (auto at = 16 * thread; at < piece.bytes; at += 16 * kThreads * kEach) {
        const auto place = [&](unsigned i) { return at + i * 16 * kThreads; };
        Wide held[kEach]{};
        GPU_UNROLL
        for (unsigned i = 0; i < kEach; ++i)
          if (place(i) + 16 <= piece.bytes) held[i] = load_as<Wide>(base + piece.at + place(i));
        GPU_UNROLL
        for (unsigned i = 0; i < kEach; ++i)
          if (place(i) + 16 <= piece.bytes ? marks.in(held[i]) : place(i) < piece.bytes) count(place(i), own);
      }
    });
    block.warp_sum(&Own::nan);
    block.warp_sum(&Own::inf);
    block.warp_max(&Own::before);
    block.each_apart([&](unsigned thread, Own& own) {
      if (thread % 32 != 0 || own.before == 0) return;
      auto& result = results[piece.result];
      atomic_add(&result.nan, own.nan);
      atomic_add(&result.inf, own.inf);
      atomic_max(&result.before, own.before);
    });
  }
};

struct Compare {
  static constexpr unsigned kThreads = 256;
  struct Shared {};
  struct Own {
    unsigned long long count, before, max_ulp, max_abs, max_rel;
  };
  const ScanPiece* pieces;
  const std::byte *a, *b;
  CompareCounts* results;

  template <typename Block>
  GPU_CODE void operator()(Block& block) const {
    const auto piece = pieces[block.x()];
    const auto part = shard::part_of(piece.dtype);
    const auto size = size_of_part(part), per_element = size * parts_of(piece.dtype);
    block.each_apart([&](unsigned thread, Own& own) {
      own = {0, 0, 0, 0, 0};
      shard::Difference sum;
      for (auto at = 16 * thread; at < piece.bytes; at += 16 * kThreads) {
        const auto *x = a + piece.at + at, *y = b + piece.at + at;
        const auto left = piece.bytes - at, end = left < 16 ? left : 16;
        if (end == 16) {
          const auto u = load_as<Wide>(x), v = load_as<Wide>(y);
          if (((u.word[0] ^ v.word[0]) | (u.word[1] ^ v.word[1]) | (u.word[2] ^ v.word[2]) | (u.word[3] ^ v.word[3])) == 0) continue;
        }
        for (unsigned i = 0; i < end; i += per_element) {
          bool differs = false;
          for (unsigned p = 0; p < per_element; p += size) {
            if (load_part(x + i + p, size) == load_part(y + i + p, size)) continue;
            differs = true;
            shard::add_difference(x + i + p, y + i + p, part, sum);
          }
          if (!differs) continue;
          own.count += 1;
          const auto before = ~(piece.first + (at + i) / per_element);
          own.before = before > own.before ? before : own.before;
        }
      }
      own.max_ulp = sum.max_ulp;
      own.max_abs = std::bit_cast<std::uint64_t>(sum.max_abs);  // of numbers that are not negative, bits and values have one order
      own.max_rel = std::bit_cast<std::uint64_t>(sum.max_rel);
    });
    block.sum(&Own::count);
    block.max(&Own::before);
    block.max(&Own::max_ulp);
    block.max(&Own::max_abs);
    block.max(&Own::max_rel);
    block.each_apart([&](unsigned thread, Own& own) {
      if (thread != 0 || own.count == 0) return;
      auto& result = results[piece.result];
      atomic_add(&result.count, own.count);
      atomic_max(&result.before, own.before);
      atomic_max(&result.max_ulp, own.max_ulp);
      atomic_max(&result.max_abs, own.max_abs);
      atomic_max(&result.max_rel, own.max_rel);
    });
  }
};

}  // namespace

shard::Difference CompareCounts::found() const {
  return {count, before ? ~before : 0, std::bit_cast<double>(static_cast<std::uint64_t>(max_abs)), std::bit_cast<double>(static_cast<std::uint64_t>(max_rel)), max_ulp};
}

void count_nonfinite(const ScanPiece* pieces, std::uint32_t count, const std::byte* base, ScanCounts* results, StreamView on) {
  launch(on, {count}, Scan{pieces, base, results});
}
void compare(const ScanPiece* pieces, std::uint32_t count, const std::byte* a, const std::byte* b, CompareCounts* results, StreamView on) {
  launch(on, {count}, Compare{pieces, a, b, results});
}

}  // namespace gpu::reshard
