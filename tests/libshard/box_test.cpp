#include "libshard/box.h"

#include "libshard/error.h"
#include "libshard/state_dict.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cstdint>
#include <map>
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

namespace {

ShardedTensor tensor_of(const Shape& shape, const std::vector<Box>& boxes) {
  ShardedTensor out{"t", DType::F32, shape, shape, {}, false};
  for (const auto& box : boxes) out.shards.push_back({box, {}, {}});
  return out;
}

/// Rows above, columns below: whichever way one sweeps, half of the boxes begin at one place.
std::vector<Box> rows_and_columns(Index n) {
  std::vector<Box> out;
  for (Index i = 0; i < n; ++i) {
    out.push_back({{i, 0}, {1, n}});
    out.push_back({{n, i}, {n, 1}});
  }
  return out;
}

}  // namespace

TEST_CASE("cover: many boxes are checked in no more time than it takes to look at each a few times") {
  constexpr Index n = 50'000;
  auto boxes = rows_and_columns(n);
  std::vector<Finding> findings;
  check_cover(tensor_of({2 * n, n}, boxes), findings);
  CHECK(findings.empty());

  boxes[2 * 777].size[1] = n - 1;  // row 777 lacks its last element
  boxes[2 * 99 + 1].size[1] = 2;   // column 99 takes the next one, too
  check_cover(tensor_of({2 * n, n}, boxes), findings);
  REQUIRE(findings.size() >= 2);
  bool hole = false, overlap = false;
  for (const auto& finding : findings) {
    hole |= finding.rule == "coverage" && finding.message.find("[777:778, 49999:50000]") != std::string::npos;
    overlap |= finding.rule == "overlap" && finding.message.find("99:101") != std::string::npos;
  }
  CHECK(hole);
  CHECK(overlap);
}

TEST_CASE("cover: any tiling is whole, and lacks or doubles what was taken or added, as counting elements says") {
  std::mt19937 random(7);
  const auto below = [&](int n) { return static_cast<Index>(random() % static_cast<unsigned>(n)); };
  for (int round = 0; round < 60; ++round) {
    const Shape shape{12, 10, 8};
    std::vector<Box> boxes{whole(shape)};
    for (int cuts = 0; cuts < 150; ++cuts) {
      auto& box = boxes[static_cast<std::size_t>(below(static_cast<int>(boxes.size())))];
      const auto d = static_cast<std::size_t>(below(3));
      if (box.size[d] < 2) continue;
      auto upper = box;
      const auto at = 1 + below(static_cast<int>(box.size[d] - 1));
      upper.lo[d] += at, upper.size[d] -= at, box.size[d] = at;
      boxes.push_back(upper);
    }
    if (round % 3 == 1) boxes.erase(boxes.begin() + below(static_cast<int>(boxes.size())));
    if (round % 3 == 2) boxes.push_back({{below(6), below(5), below(4)}, {1 + below(6), 1 + below(5), 1 + below(4)}});
    std::map<Shape, int> held;
    auto distinct = boxes;
    const auto less = [](const Box& a, const Box& b) { return a.lo != b.lo ? a.lo < b.lo : a.size < b.size; };
    std::sort(distinct.begin(), distinct.end(), less);
    distinct.erase(std::unique(distinct.begin(), distinct.end()), distinct.end());
    for (const auto& box : distinct)
      for (Index i = 0; i < volume(box.size); ++i) {
        auto at = unravel(i, box.size);
        for (std::size_t d = 0; d < 3; ++d) at[d] += box.lo[d];
        ++held[at];
      }
    const bool hole = static_cast<Index>(held.size()) < volume(shape);
    const bool twice = std::any_of(held.begin(), held.end(), [](const auto& entry) { return entry.second > 1; });
    std::vector<Finding> findings;
    check_cover(tensor_of(shape, boxes), findings);
    const auto has = [&](const char* rule) { return std::any_of(findings.begin(), findings.end(), [&](const auto& f) { return f.rule == rule; }); };
    CHECK(has("coverage") == hole);
    CHECK(has("overlap") == twice);
  }
}

TEST_CASE("cover: needles that pass one another, which no plane parts, are compared all the same") {
  constexpr Index n = 100;
  std::vector<Box> boxes;
  for (Index i = 0; i < n; i += 2)
    for (Index j = 0; j < n; j += 2) {
      boxes.push_back({{i, j, 0}, {1, 1, n}});
      boxes.push_back({{0, i + 1, j}, {n, 1, 1}});
      boxes.push_back({{i + 1, 0, j + 1}, {1, n, 1}});
    }
  std::vector<Finding> findings;
  check_cover(tensor_of({n, n, n}, boxes), findings);
  CHECK(!findings.empty());
  CHECK(std::all_of(findings.begin(), findings.end(), [](const Finding& f) { return f.rule == "coverage"; }));
  findings.clear();
  boxes.push_back({{40, 40, 40}, {1, 1, 2}});
  check_cover(tensor_of({n, n, n}, boxes), findings);
  CHECK(std::any_of(findings.begin(), findings.end(), [](const Finding& f) { return f.rule == "overlap"; }));
}

TEST_CASE("cover: a tensor without shards is one hole") {
  std::vector<Finding> findings;
  check_cover(tensor_of({4, 4}, {}), findings);
  check_cover(tensor_of({}, {}), findings);
  check_cover(tensor_of({0, 4}, {}), findings);
  REQUIRE(findings.size() == 2);
  CHECK(findings[0].message == "no shard holds [0:4, 0:4] of [4, 4]");
}

TEST_CASE("boxes of a stranger's numbers are told without wrapping") {
  CHECK(to_string(Box{{INT64_MAX}, {2}}) == "[9223372036854775807:9223372036854775807+2]");
}

TEST_CASE("cover: slabs that cross leave more holes than are counted") {
  constexpr Index n = 50, dims = 5;
  std::vector<Box> boxes;
  const Shape shape(dims, 2 * n + 1);
  for (std::size_t d = 0; d < dims; ++d)
    for (Index i = 0; i < n; ++i) {
      boxes.push_back(whole(shape));
      boxes.back().lo[d] = 2 * i + 1, boxes.back().size[d] = 1;
    }
  std::vector<Finding> findings;
  check_cover(tensor_of(shape, boxes), findings);
  CHECK(!findings.empty());
}

TEST_CASE("cover: more interlocked shards than can be compared are told to be so") {
  constexpr Index n = 130;
  std::vector<Box> boxes;
  for (Index i = 0; i < n; ++i)
    for (Index j = 0; j < n; ++j) {
      boxes.push_back({{0, 2 * i, 2 * j + 1}, {2 * n, 1, 1}});
      boxes.push_back({{2 * i + 1, 0, 2 * j}, {1, 2 * n, 1}});
      boxes.push_back({{2 * i, 2 * j + 1, 0}, {1, 1, 2 * n}});
    }
  std::vector<Finding> findings;
  check_cover(tensor_of({2 * n, 2 * n, 2 * n}, boxes), findings);
  REQUIRE(!findings.empty());
  CHECK(findings.back().message.find("interlock") != std::string::npos);
}
