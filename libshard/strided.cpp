// Nested loops over byte strides; the two inner ones are blocked so that a transpose stays in cache.
#include "libshard/strided.h"

#include <algorithm>
#include <cstring>

namespace shard {
namespace {

constexpr Index kBlock = 32;

template <std::size_t Run>
void plane(std::byte* to, const std::byte* from, const MemoryStep& outer, const MemoryStep& inner) {
  for (Index i0 = 0; i0 < outer.count; i0 += kBlock)
    for (Index j0 = 0; j0 < inner.count; j0 += kBlock) {
      const auto i1 = std::min(i0 + kBlock, outer.count), j1 = std::min(j0 + kBlock, inner.count);
      for (Index i = i0; i < i1; ++i)
        for (Index j = j0; j < j1; ++j)
          std::memcpy(to + i * outer.to + j * inner.to, from + i * outer.from + j * inner.from, Run);
    }
}

void rows(std::byte* to, const std::byte* from, const MemoryStep& outer, const MemoryStep& inner, std::size_t run) {
  for (Index i = 0; i < outer.count; ++i)
    for (Index j = 0; j < inner.count; ++j)
      std::memcpy(to + i * outer.to + j * inner.to, from + i * outer.from + j * inner.from, run);
}

void walk(std::byte* to, const std::byte* from, const MemoryStep* steps, std::size_t depth, std::size_t run) {
  if (depth > 2) {
    for (Index i = 0; i < steps->count; ++i)
      walk(to + i * steps->to, from + i * steps->from, steps + 1, depth - 1, run);
    return;
  }
  const MemoryStep once{1, 0, 0};
  const auto& outer = depth == 2 ? steps[0] : once;
  const auto& inner = depth >= 1 ? steps[depth - 1] : once;
  switch (run) {
    case 1: return plane<1>(to, from, outer, inner);
    case 2: return plane<2>(to, from, outer, inner);
    case 4: return plane<4>(to, from, outer, inner);
    case 8: return plane<8>(to, from, outer, inner);
    default: return rows(to, from, outer, inner, run);
  }
}

}  // namespace

void strided_copy(std::byte* to, const std::byte* from, const std::vector<MemoryStep>& steps, std::size_t run) {
  walk(to, from, steps.data(), steps.size(), run);
}

}  // namespace shard
