#include "libshard/box.h"

#include "libshard/error.h"
#include "libshard/state_dict.h"

#include <doctest/doctest.h>

#include <random>
#include <set>

using namespace shard;

namespace {

Box random_box(const Shape& shape, std::mt19937& random) {
  Box out;
  for (const auto size : shape) {
    const auto lo = static_cast<Index>(random() % static_cast<std::uint64_t>(size));
    out.lo.push_back(lo);
    out.size.push_back(1 + static_cast<Index>(random() % static_cast<std::uint64_t>(size - lo)));
  }
  return out;
}

std::set<Shape> points(const Box& box) {
  std::set<Shape> out;
  for (Index i = 0; i < volume(box.size); ++i) {
    auto at = unravel(i, box.size);
    for (std::size_t d = 0; d < at.size(); ++d) at[d] += box.lo[d];
    out.insert(at);
  }
  return out;
}

}  // namespace

TEST_CASE("subtract and intersect partition a box") {
  std::mt19937 random(1);
  const Shape shape{6, 5, 7};
  for (int i = 0; i < 300; ++i) {
    const auto a = random_box(shape, random), b = random_box(shape, random);
    auto rest = points(a);
    std::size_t count = 0;
    if (const auto common = intersect(a, b)) {
      for (const auto& point : points(*common)) rest.erase(point);
      count += static_cast<std::size_t>(volume(common->size));
    }
    for (const auto& piece : subtract(a, b)) {
      for (const auto& point : points(piece)) CHECK(rest.erase(point) == 1);
      count += static_cast<std::size_t>(volume(piece.size));
    }
    CHECK(rest.empty());
    CHECK(count == static_cast<std::size_t>(volume(a.size)));
  }
}

TEST_CASE("flat ranges cover exactly their elements, in order") {
  for (const Shape& shape : {Shape{4, 3, 5}, Shape{7}, Shape{2, 1, 6}, Shape{1, 9}}) {
    const auto all = volume(shape);
    for (Index lo = 0; lo <= all; ++lo)
      for (Index hi = lo; hi <= all; ++hi) {
        Index next = lo;
        for (const auto& box : flat_range(shape, lo, hi))
          for (const auto& point : points(box)) {
            Index flat = 0;
            for (std::size_t d = 0; d < shape.size(); ++d) flat = flat * shape[d] + point[d];
            REQUIRE(flat == next++);
          }
        REQUIRE(next == hi);
      }
  }
  CHECK(flat_range({}, 0, 1).size() == 1);
}

TEST_CASE("volumes that overflow are refused, also where another size is zero in between") {
  CHECK_THROWS_AS(volume({Index{1} << 40, Index{1} << 40}), Error);
  CHECK_THROWS_AS(volume({-1, 3}), Error);
  CHECK(volume({Index{1} << 40, 0, Index{1} << 40}) == 0);
  CHECK(volume({}) == 1);
}

TEST_CASE("cover: holes and overlaps are found by box, also where volumes add up") {
  ShardedTensor tensor{"w", DType::F32, {4, 4}, {4, 4}, {}, false};
  const auto add = [&](Shape lo, Shape size) { tensor.shards.push_back({{std::move(lo), std::move(size)}, {0, 0, {16, 4}}, {}}); };
  add({0, 0}, {2, 4});
  add({1, 0}, {2, 4});
  std::vector<Finding> findings;
  check_cover(tensor, findings);
  REQUIRE(findings.size() == 2);
  CHECK(findings[0].rule == "overlap");
  CHECK(findings[1].rule == "coverage");
  CHECK(findings[1].message.find("[3:4, 0:4]") != std::string::npos);
  tensor.shards.clear();
  findings.clear();
  add({0, 0}, {4, 2});
  add({0, 2}, {4, 2});
  add({0, 2}, {4, 2});  // a replica
  check_cover(tensor, findings);
  CHECK(findings.empty());
  add({2, 2}, {4, 2});
  check_cover(tensor, findings);
  CHECK(findings.size() == 1);
}
