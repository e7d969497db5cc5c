// Fixed pieces, each on one thread, joined in order.
#include "lm/look.h"

#include "libshard/float_bits.h"
#include "lm/cpu/workers.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <vector>

namespace lm {
namespace {

typedef std::uint16_t Halves __attribute__((vector_size(32), aligned(2), may_alias));
typedef std::uint32_t Words __attribute__((vector_size(32), aligned(2), may_alias));
typedef float Floats __attribute__((vector_size(32), may_alias));

constexpr std::uint64_t kPiece = 256 << 10;
constexpr std::uint64_t kBlock = 4096;  // squares of so many elements are summed in f32, by lanes; blocks in f64

// By value: a vector whose lanes are taken where it lies would lie in memory all the time.
SHARD_INLINE double joined(Floats lanes, double start) {
  float items[8];
  std::memcpy(items, &lanes, sizeof items);
  for (const auto item : items) start += static_cast<double>(item);
  return start;
}
template <typename T, typename Lanes, typename Join>
SHARD_INLINE T joined(Lanes lanes, Join join) {
  T items[sizeof lanes / sizeof(T)];
  std::memcpy(items, &lanes, sizeof items);
  auto out = items[0];
  for (const auto item : items) out = join(out, item);
  return out;
}
constexpr auto kMost = [](auto a, auto b) { return a > b ? a : b; };
constexpr auto kEither = [](auto a, auto b) { return static_cast<decltype(a)>(a | b); };

SHARD_CLONES Sight look_bf16(const std::byte* data, std::uint64_t count) {
  std::uint16_t first;
  std::memcpy(&first, data, 2);
  constexpr std::uint64_t kLanes = 16;
  Halves other{}, top{};
  double squares = 0;
  const auto even = count / kLanes * kLanes;
  for (std::uint64_t begin = 0; begin < even; begin += kBlock) {
    const auto end = std::min(even, begin + kBlock);
    Floats low{}, high{};
    for (auto i = begin; i < end; i += kLanes) {
      const auto bits = *reinterpret_cast<const Halves*>(data + 2 * i);
      const auto magnitude = bits & 0x7fff;
      other |= bits ^ first;
      top = magnitude > top ? magnitude : top;
      const auto pairs = (Words)bits;
      const auto a = (Floats)(pairs << 16), b = (Floats)(pairs & 0xffff0000u);
      low += a * a;
      high += b * b;
    }
    squares = joined(high, joined(low, squares));
  }
  auto most = joined<std::uint16_t>(top, kMost), differs = joined<std::uint16_t>(other, kEither);
  for (auto i = even; i < count; ++i) {
    std::uint16_t bits;
    std::memcpy(&bits, data + 2 * i, 2);
    const float value = std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
    most = std::max<std::uint16_t>(most, bits & 0x7fff);
    differs = static_cast<std::uint16_t>(differs | (bits ^ first));
    squares += static_cast<double>(value * value);
  }
  return {most >= 0x7f80, differs == 0, std::bit_cast<float>(static_cast<std::uint32_t>(most) << 16), squares};
}

SHARD_CLONES Sight look_f32(const std::byte* data, std::uint64_t count) {
  std::uint32_t first;
  std::memcpy(&first, data, 4);
  constexpr std::uint64_t kLanes = 8;
  Words other{}, top{};
  double squares = 0;
  const auto even = count / kLanes * kLanes;
  for (std::uint64_t begin = 0; begin < even; begin += kBlock) {
    const auto end = std::min(even, begin + kBlock);
    Floats sum{};
    for (auto i = begin; i < end; i += kLanes) {
      const auto bits = *reinterpret_cast<const Words*>(data + 4 * i);
      const auto magnitude = bits & 0x7fffffffu;
      other |= bits ^ first;
      top = magnitude > top ? magnitude : top;
      sum += (Floats)bits * (Floats)bits;
    }
    squares = joined(sum, squares);
  }
  auto most = joined<std::uint32_t>(top, kMost), differs = joined<std::uint32_t>(other, kEither);
  for (auto i = even; i < count; ++i) {
    std::uint32_t bits;
    std::memcpy(&bits, data + 4 * i, 4);
    const float value = std::bit_cast<float>(bits);
    most = std::max(most, bits & 0x7fffffff);
    differs |= bits ^ first;
    squares += static_cast<double>(value * value);
  }
  return {most >= 0x7f800000, differs == 0, std::bit_cast<float>(most), squares};
}

}  // namespace

Sight look(std::span<const std::byte> bytes, shard::DType dtype, unsigned threads, const std::function<void(std::span<const std::byte>)>& piece) {
  const auto item = size_of(dtype), step = static_cast<std::size_t>(kPiece) * item, count = (bytes.size() + step - 1) / step;
  if (count == 0) return {};
  std::vector<Sight> seen(count);
  cpu::run_on_workers(count, threads, [&](std::size_t i) {
    const auto part = bytes.subspan(i * step, std::min(step, bytes.size() - i * step));
    if (piece) piece(part);
    seen[i] = dtype == shard::DType::BF16 ? look_bf16(part.data(), part.size() / item) : look_f32(part.data(), part.size() / item);
    seen[i].constant = seen[i].constant && std::memcmp(part.data(), bytes.data(), item) == 0;
  });
  auto out = seen[0];
  for (std::size_t i = 1; i < count; ++i) {
    out.nonfinite = out.nonfinite || seen[i].nonfinite;
    out.constant = out.constant && seen[i].constant;
    out.max_abs = std::max(out.max_abs, seen[i].max_abs);
    out.squares += seen[i].squares;
  }
  return out;
}

}  // namespace lm
