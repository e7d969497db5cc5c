// Box algebra, dimension by dimension.
#include "libshard/box.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <limits>

#include "libshard/error.h"

namespace shard {

Index volume(const Shape& shape) {
  Index out = 1;
  bool none = false;
  for (const auto size : shape) {
    require(size >= 0, Code::BadFormat,
            [&] { return fmt::format("shape {}: a size is negative", to_string(shape)); });
    none |= size == 0;
  }
  if (none) return 0;
  for (const auto size : shape)
    require(!__builtin_mul_overflow(out, size, &out), Code::BadFormat,
            [&] { return fmt::format("shape {}: more elements than 64 bits count", to_string(shape)); });
  return out;
}

Box whole(const Shape& shape) { return {Shape(shape.size(), 0), shape}; }

bool empty(const Box& box) {
  return std::any_of(box.size.begin(), box.size.end(), [](Index size) { return size <= 0; });
}

bool contains(const Box& outer, const Box& inner) {
  for (std::size_t d = 0; d < outer.lo.size(); ++d)
    if (inner.lo[d] < outer.lo[d] || inner.lo[d] + inner.size[d] > outer.lo[d] + outer.size[d]) return false;
  return true;
}

std::optional<Box> intersect(const Box& a, const Box& b) {
  Box out{Shape(a.lo.size()), Shape(a.lo.size())};
  for (std::size_t d = 0; d < a.lo.size(); ++d) {
    out.lo[d] = std::max(a.lo[d], b.lo[d]);
    out.size[d] = std::min(a.lo[d] + a.size[d], b.lo[d] + b.size[d]) - out.lo[d];
    if (out.size[d] <= 0) return std::nullopt;
  }
  return out;
}

std::vector<Box> subtract(const Box& from, const Box& what) {
  const auto common = intersect(from, what);
  if (!common) return {from};
  std::vector<Box> out;
  auto rest = from;
  for (std::size_t d = 0; d < from.lo.size(); ++d) {
    if (const auto below = common->lo[d] - rest.lo[d]; below > 0) {
      out.push_back(rest);
      out.back().size[d] = below;
    }
    if (const auto above = rest.lo[d] + rest.size[d] - common->lo[d] - common->size[d]; above > 0) {
      out.push_back(rest);
      out.back().lo[d] = common->lo[d] + common->size[d];
      out.back().size[d] = above;
    }
    rest.lo[d] = common->lo[d];
    rest.size[d] = common->size[d];
  }
  return out;
}

namespace {

/// Appends the boxes of a flat range within the last dimensions from `d` on, behind fixed leading indices.
void add_range(const Shape& shape, std::size_t d, Index lo, Index hi, Shape& leading, std::vector<Box>& out) {
  if (lo >= hi) return;
  Index inner = 1;
  for (auto i = d + 1; i < shape.size(); ++i) inner *= shape[i];
  const auto emit = [&](Index from, Index count) {
    Box box{leading, Shape(leading.size(), 1)};
    box.lo.push_back(from);
    box.size.push_back(count);
    for (auto i = d + 1; i < shape.size(); ++i) box.lo.push_back(0), box.size.push_back(shape[i]);
    out.push_back(std::move(box));
  };
  const auto within = [&](Index row, Index from, Index to) {
    leading.push_back(row);
    add_range(shape, d + 1, from, to, leading, out);
    leading.pop_back();
  };
  const auto first = lo / inner, last = hi / inner;
  if (first == last) return within(first, lo % inner, hi % inner);
  auto begin = first;
  if (lo % inner) within(begin++, lo % inner, inner);
  if (begin < last) emit(begin, last - begin);
  if (hi % inner) within(last, 0, hi % inner);
}

}  // namespace

std::vector<Box> flat_range(const Shape& shape, Index lo, Index hi) {
  const auto all = volume(shape);
  require(0 <= lo && lo <= hi && hi <= all, Code::BadFormat,
          [&] { return fmt::format("range [{}, {}) of {} elements", lo, hi, all); });
  if (shape.empty()) return lo < hi ? std::vector<Box>{Box{}} : std::vector<Box>{};
  if (all == 0) return {};
  std::vector<Box> out;
  Shape leading;
  add_range(shape, 0, lo, hi, leading, out);
  return out;
}

Shape row_major(const Shape& shape) {
  constexpr auto kLargest = std::numeric_limits<Index>::max() / 16;  // in bytes it is an Index as well
  Shape out(shape.size());
  Index step = 1;
  for (auto d = shape.size(); d-- > 0;) {
    out[d] = step;
    if (d == 0 || (!__builtin_mul_overflow(step, shape[d], &step) && step <= kLargest)) continue;
    require(empty({shape, shape}), Code::BadFormat,
            [&] { return fmt::format("shape {}: strides beyond 64 bits", to_string(shape)); });
    step = 0;  // where nothing is, nothing is stepped over
  }
  return out;
}

Shape unravel(Index flat, const Shape& shape) {
  Shape out(shape.size());
  for (auto d = shape.size(); d-- > 0;) {
    if (shape[d] == 0) continue;
    out[d] = flat % shape[d];
    flat /= shape[d];
  }
  return out;
}

std::string to_string(const Box& box) {
  std::string out = "[";
  for (std::size_t d = 0; d < box.lo.size(); ++d) {
    Index end = 0;
    const bool wraps = __builtin_add_overflow(box.lo[d], box.size[d], &end);  // a stranger's numbers
    out += wraps ? fmt::format("{}{}:{}+{}", d ? ", " : "", box.lo[d], box.lo[d], box.size[d]) : fmt::format("{}{}:{}", d ? ", " : "", box.lo[d], end);
  }
  return out + "]";
}

std::string to_string(const Shape& shape) { return fmt::format("[{}]", fmt::join(shape, ", ")); }

}  // namespace shard
