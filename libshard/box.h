// Boxes of indices and their algebra. Integers only; knows nothing of bytes or files.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace shard {

using Index = std::int64_t;
using Shape = std::vector<Index>;

/// The indices i with lo <= i < lo + size, dimension by dimension. A box of no dimensions holds one index.
struct Box {
  Shape lo, size;
  bool operator==(const Box&) const = default;
};

/// Product of the sizes; throws BadFormat where it does not fit an Index or a size is negative.
Index volume(const Shape& shape);
/// The box [0, shape).
Box whole(const Shape& shape);
bool empty(const Box& box);
bool contains(const Box& outer, const Box& inner);
/// The common part; nullopt where there is none.
std::optional<Box> intersect(const Box& a, const Box& b);
/// `from` without `what`, as disjoint boxes (at most two per dimension).
std::vector<Box> subtract(const Box& from, const Box& what);
/// The row-major flat range [lo, hi) of `shape` as disjoint boxes in ascending order.
std::vector<Box> flat_range(const Shape& shape, Index lo, Index hi);
/// Row-major strides in elements.
Shape row_major(const Shape& shape);
/// The multi-dimensional index of a row-major flat one.
Shape unravel(Index flat, const Shape& shape);
/// "[0:4, 16:32]"
std::string to_string(const Box& box);
/// "[4, 32]"
std::string to_string(const Shape& shape);

}  // namespace shard
