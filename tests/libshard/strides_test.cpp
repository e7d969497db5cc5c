#include <doctest/doctest.h>

#include "libshard/box.h"
#include "libshard/error.h"

using namespace shard;

TEST_CASE("strides of empty boxes stay within 64 bits, also as bytes") {
  constexpr Index kBig = Index{1} << 62;
  CHECK(row_major({2, 0, 3}) == Shape{0, 3, 1});
  CHECK(row_major({0, kBig, kBig}) == Shape{0, 0, 1});
  CHECK(row_major({4, 3, 2}) == Shape{6, 2, 1});
  CHECK(row_major({kBig}) == Shape{1});
  CHECK_THROWS_AS(row_major({2, kBig, 2}), Error);
}

TEST_CASE("a flat range outside its shape is refused") {
  CHECK(flat_range({2, 0}, 0, 0).empty());
  CHECK(flat_range({3, 4}, 12, 12).empty());
  CHECK_THROWS_AS(flat_range({3, 4}, 0, 13), Error);
  CHECK_THROWS_AS(flat_range({3, 4}, 5, 4), Error);
  CHECK_THROWS_AS(flat_range({3, 4}, -1, 4), Error);
}
