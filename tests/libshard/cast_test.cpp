#include <doctest/doctest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "libshard/error.h"
#include "libshard/numeric.h"

using namespace shard;

namespace {

/// Every finite number of a small type with its bits, ascending; of equal ones (zero) the first stays.
std::vector<std::pair<double, std::uint32_t>> numbers(DType dtype) {
  std::vector<std::pair<double, std::uint32_t>> out;
  for (std::uint32_t bits = 0; bits < (size_of(dtype) == 1 ? 256u : 65536u); ++bits) {
    const auto value = value_at(reinterpret_cast<const std::byte*>(&bits), dtype);  // little-endian
    if (std::isfinite(value) && !(value == 0 && std::signbit(value))) out.emplace_back(value, bits);
  }
  std::sort(out.begin(), out.end());
  return out;
}

/// The nearest number by search; of two as near the one with even bits. Not for numbers beyond the largest.
double nearest(const std::vector<std::pair<double, std::uint32_t>>& all, double value) {
  const auto above = std::lower_bound(all.begin(), all.end(), std::pair{value, 0u});
  if (above == all.end()) return all.back().first;
  if (above == all.begin()) return above->first;
  const auto below = std::prev(above);
  const auto up = above->first - value, down = value - below->first;  // exact: of a few bits each
  return up < down || (up == down && above->second % 2 == 0) ? above->first : below->first;
}

template <typename T>
std::vector<double> cast_all(const std::vector<T>& from, DType from_type, DType to_type) {
  std::vector<std::byte> to(from.size() * size_of(to_type) + 1);
  const auto odd = std::span(to).subspan(1);  // alignment is not promised
  cast(std::as_bytes(std::span(from)), from_type, odd, to_type);
  std::vector<double> out;
  for (std::size_t i = 0; i < from.size(); ++i) out.push_back(value_at(&odd[i * size_of(to_type)], to_type));
  return out;
}

template <typename T>
void check_rounding(DType from_type, DType to_type, std::uint32_t seed) {
  const auto all = numbers(to_type);
  std::mt19937 random(seed);
  std::vector<T> values;
  for (int i = 0; i < 4000; ++i) {  // numbers, the middles between neighbours, and what lies beside them
    const auto at = random() % (all.size() - 1);
    const auto a = all[at].first, b = all[at + 1].first, middle = a + (b - a) / 2;
    for (const auto value : {a, middle, a + (b - a) * (random() / 4294967296.0)}) {
      values.push_back(static_cast<T>(value));
      values.push_back(std::nextafter(static_cast<T>(value), std::numeric_limits<T>::infinity()));
      values.push_back(std::nextafter(static_cast<T>(value), -std::numeric_limits<T>::infinity()));
    }
  }
  std::erase_if(values, [&](T value) { return std::abs(value) > all.back().first; });
  const auto out = cast_all(values, from_type, to_type);
  for (std::size_t i = 0; i < values.size(); ++i) {
    CAPTURE(values[i]);
    REQUIRE(out[i] == nearest(all, values[i]));
  }
}

}  // namespace

TEST_CASE("casts give the nearest number, subnormals and ties included") {
  for (const auto to : {DType::F16, DType::BF16, DType::F8E4M3, DType::F8E5M2}) {
    CAPTURE(name(to));
    check_rounding<float>(DType::F32, to, 1);
    check_rounding<double>(DType::F64, to, 2);
  }
}

TEST_CASE("between two small types a cast is the cast of the number") {
  const DType small[] = {DType::F16, DType::BF16, DType::F8E4M3, DType::F8E5M2};
  for (const auto from : small)
    for (const auto to : small) {
      if (from == to) continue;
      CAPTURE(name(from));
      CAPTURE(name(to));
      std::vector<float> wide;
      std::vector<std::uint8_t> bytes;
      for (const auto& [value, bits] : numbers(from)) {
        wide.push_back(static_cast<float>(value));
        for (std::size_t i = 0; i < size_of(from); ++i)
          bytes.push_back(static_cast<std::uint8_t>(bits >> 8 * i));
      }
      std::vector<std::byte> a(wide.size() * size_of(to)), b(a.size());
      cast(std::as_bytes(std::span(bytes)), from, a, to);
      cast(std::as_bytes(std::span(wide)), DType::F32, b, to);
      CHECK(std::memcmp(a.data(), b.data(), a.size()) == 0);
    }
}

TEST_CASE("what a type cannot hold") {
  constexpr auto kInf = std::numeric_limits<float>::infinity();
  const std::vector<float> values{kInf, -kInf, std::nanf(""), 1e38f, -0.0f};
  for (const auto to : {DType::F64, DType::F16, DType::BF16, DType::F8E5M2}) {
    const auto out = cast_all(values, DType::F32, to);
    CHECK(out[0] == kInf);
    CHECK(out[1] == -kInf);
    CHECK(std::isnan(out[2]));
    CHECK(std::signbit(out[4]));
  }
  for (const auto value :
       cast_all(std::vector{465.0f, -465.0f, kInf, -kInf, std::nanf("")}, DType::F32, DType::F8E4M3))
    CHECK(std::isnan(value));
  CHECK(cast_all(std::vector{464.0f}, DType::F32, DType::F8E4M3)[0] == 448);
  CHECK(cast_all(std::vector{1e300}, DType::F64, DType::F32)[0] == kInf);
  std::vector<std::byte> one(1);
  CHECK_THROWS_AS(cast(one, DType::U8, one, DType::I8), Error);
  CHECK_THROWS_AS(cast(std::as_bytes(std::span(values)), DType::F32, one, DType::BF16), Error);
}

TEST_CASE("what is not finite is found at every place of a block, in every type") {
  std::mt19937 random(3);
  for (const auto dtype :
       {DType::F64, DType::F32, DType::F16, DType::BF16, DType::F8E5M2, DType::C64, DType::C128})
    for (int round = 0; round < 200; ++round) {
      const std::size_t n = 1 + random() % 9000, bad = random() % n;
      std::vector<std::byte> bytes(n * size_of(dtype) + 1);
      const auto odd = std::span(bytes).subspan(1);
      CHECK(count_nonfinite(odd, dtype).nan + count_nonfinite(odd, dtype).inf == 0);
      const auto part = dtype == DType::C64 ? DType::F32 : dtype == DType::C128 ? DType::F64 : dtype;
      const double value = round % 2 ? std::nan("") : -std::numeric_limits<double>::infinity();
      const auto place = odd.subspan((bad + 1) * size_of(dtype) - size_of(part), size_of(part));
      cast(std::as_bytes(std::span(&value, 1)), DType::F64, place, part);
      const auto found = count_nonfinite(odd, dtype);
      CHECK(found.first == bad);
      CHECK(found.nan == (round % 2 ? 1 : 0));
      CHECK(found.inf == (round % 2 ? 0 : 1));
    }
}

TEST_CASE("steps between neighbours and between integers") {
  const auto steps = [](auto a, auto b, DType dtype) {
    return ulp_distance(reinterpret_cast<const std::byte*>(&a), reinterpret_cast<const std::byte*>(&b),
                        dtype);
  };
  CHECK(steps(0.0f, -0.0f, DType::F32) == 0);
  CHECK(steps(std::numeric_limits<float>::denorm_min(), -std::numeric_limits<float>::denorm_min(),
              DType::F32) == 2);
  CHECK(steps(1.0, std::nextafter(1.0, 0.0), DType::F64) == 1);
  CHECK(steps(1.0, std::nan(""), DType::F64) == std::numeric_limits<std::uint64_t>::max());
  CHECK(steps(std::int32_t{-1}, std::int32_t{0}, DType::I32) == 1);
  CHECK(steps(std::int64_t{INT64_MIN}, std::int64_t{INT64_MAX}, DType::I64) == UINT64_MAX);
  CHECK(steps(std::uint8_t{0}, std::uint8_t{255}, DType::U8) == 255);
}

TEST_CASE("differences in the imaginary part and between large integers count") {
  const float a[] = {1, 2}, b[] = {1, 2.5f};
  const auto complex = compare(std::as_bytes(std::span(a)), std::as_bytes(std::span(b)), DType::C64);
  CHECK(complex.count == 1);
  CHECK(complex.max_abs == 0.5);
  const std::int64_t c[] = {(1ll << 60) + 1}, d[] = {1ll << 60};
  const auto integers = compare(std::as_bytes(std::span(c)), std::as_bytes(std::span(d)), DType::I64);
  CHECK(integers.max_abs == 1);
  CHECK(integers.max_ulp == 1);
  CHECK_THROWS_AS(compare(std::as_bytes(std::span(a)), std::as_bytes(std::span(c)).first(4), DType::F32),
                  Error);
}
