// Boxes on the device against the CPU's meaning: one element after another, cast by shard::cast().
#include "gpu/reshard/boxes.h"

#include "gpu/reshard/box_kernels.h"
#include "libshard/numeric.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>

using gpu::reshard::Box;
using gpu::reshard::BoxList;
using shard::DType;
using shard::Index;
using Bytes = std::vector<std::byte>;

namespace {

std::mt19937_64 random_engine(20);
std::uint64_t below(std::uint64_t end) { return std::uniform_int_distribution<std::uint64_t>(0, end - 1)(random_engine); }

Bytes noise(std::size_t size) {
  Bytes out(size);
  for (auto& byte : out) byte = static_cast<std::byte>(below(256));
  return out;
}

void walk(const Box& box, std::size_t d, std::uint64_t from, std::uint64_t to, const Bytes& source, Bytes& target) {
  if (d < box.dims.size()) {
    for (Index i = 0; i < box.dims[d].count; ++i)
      walk(box, d + 1, from + static_cast<std::uint64_t>(i * box.dims[d].from), to + static_cast<std::uint64_t>(i * box.dims[d].to), source, target);
    return;
  }
  shard::cast(std::span(source).subspan(from, size_of(box.from_type)), box.from_type, std::span(target).subspan(to, size_of(box.to_type)), box.to_type);
}

Bytes on_device(const std::vector<Box>& boxes, const Bytes& source, const Bytes& before) {
  gpu::Stream stream;
  BoxList list;
  for (const auto& box : boxes) list.add(box);
  Bytes table(list.table_bytes() + 1), out(before.size());
  list.store(table.data());
  const gpu::DeviceBuffer from(source.size()), to(before.size()), entries(table.size());
  gpu::to_device(from.data(), source.data(), source.size(), stream);
  gpu::to_device(to.data(), before.data(), before.size(), stream);
  gpu::to_device(entries.data(), table.data(), table.size(), stream);
  list.run(entries.data(), from.data(), to.data(), stream);
  gpu::to_host(out.data(), to.data(), out.size(), stream);
  stream.wait();
  return out;
}

/// As on the host, every byte; those that no box writes stay.
void check(const std::vector<Box>& boxes, std::size_t source_size, std::size_t target_size) {
  const auto source = noise(source_size), before = noise(target_size);
  auto expected = before;
  for (const auto& box : boxes) walk(box, 0, box.from, box.to, source, expected);
  const auto got = on_device(boxes, source, before);
  const auto differ = std::mismatch(got.begin(), got.end(), expected.begin());
  CAPTURE(differ.first - got.begin());
  CHECK(differ.first == got.end());
}

constexpr DType kFloating[] = {DType::F64, DType::F32, DType::F16, DType::BF16, DType::F8E4M3, DType::F8E5M2};

/// Strides of dimensions that lie in a random order, with holes between some.
std::vector<Index> random_strides(const std::vector<Index>& counts, Index item, Index hole, std::uint64_t& span) {
  std::vector<std::size_t> order(counts.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::shuffle(order.begin(), order.end(), random_engine);
  std::vector<Index> out(counts.size());
  Index stride = item;
  for (const auto d : order) {
    out[d] = stride;
    stride = stride * counts[d] + (below(3) ? 0 : static_cast<Index>(below(3)) * hole);
  }
  span = static_cast<std::uint64_t>(stride);
  return out;
}

}  // namespace

TEST_CASE("random boxes: shapes, strides, types, alignments, many at once") {
  std::size_t runs = 0, casts = 0, tiles = 0;
  for (int round = 0; round < 300; ++round) {
    std::vector<Box> boxes;
    std::uint64_t source_size = 0, target_size = 0;
    for (auto left = 1 + below(5); left > 0; --left) {
      Box box{};
      box.from_type = kFloating[below(6)];
      box.to_type = below(2) ? box.from_type : kFloating[below(6)];
      const auto item = static_cast<Index>(size_of(box.from_type)), wide = static_cast<Index>(size_of(box.to_type));
      std::vector<Index> counts(below(8) == 0 ? below(9) : below(4));
      for (auto& count : counts) count = static_cast<Index>(counts.size() > 4 ? 1 + below(3) : below(12) ? 1 + below(round % 10 ? 20 : 150) : 1);
      std::uint64_t from_span = 0, to_span = 0;
      const bool odd = below(4) == 0;  // elements off their alignment
      const auto from = random_strides(counts, item, odd ? 1 : item, from_span), to = random_strides(counts, wide, odd ? 1 : wide, to_span);
      for (std::size_t d = 0; d < counts.size(); ++d) box.dims.push_back({counts[d], below(20) ? from[d] : 0, to[d]});
      const auto place = [&](std::uint64_t size, Index unit) { return odd ? size + below(16) : (size + 15) / 16 * 16 + below(4) * static_cast<std::uint64_t>(unit); };
      box.from = place(source_size, item);
      box.to = place(target_size, wide);
      source_size = box.from + from_span + 16;
      target_size = box.to + to_span + 16;
      BoxList one;
      one.add(box);
      runs += one.runs().size();
      casts += one.casts().size();
      tiles += one.tiles().size();
      boxes.push_back(std::move(box));
    }
    check(boxes, source_size, target_size);
  }
  CHECK(runs > 100);   // every kernel had its share
  CHECK(casts > 100);
  CHECK(tiles > 30);
}

TEST_CASE("every bit pattern of the narrow types and every kind of NaN is cast as on the CPU") {
  for (const auto from : kFloating)
    for (const auto to : kFloating) {
      if (from == to) continue;
      const auto item = size_of(from);
      Bytes source;
      const auto add = [&](std::uint64_t bits) {
        for (std::size_t i = 0; i < item; ++i) source.push_back(static_cast<std::byte>(bits >> 8 * i));
      };
      if (item <= 2)
        for (std::uint64_t bits = 0; bits < std::uint64_t{1} << 8 * item; ++bits) add(bits);
      const int mantissa = from == DType::F64 ? 52 : 23, exponents = from == DType::F64 ? 2048 : 256;
      if (item > 2)
        for (std::uint64_t sign = 0; sign < 2; ++sign)
          for (std::uint64_t exponent = 0; exponent < static_cast<std::uint64_t>(exponents); ++exponent)
            for (int bit = -1; bit < mantissa; ++bit)
              for (std::uint64_t more : {std::uint64_t{0}, std::uint64_t{1}, below(std::uint64_t{1} << mantissa)})
                add((sign * static_cast<std::uint64_t>(exponents) + exponent) << mantissa | ((bit < 0 ? 0 : std::uint64_t{1} << bit) ^ more));
      const auto count = static_cast<Index>(source.size() / item);
      Bytes expected(static_cast<std::size_t>(count) * size_of(to));
      shard::cast(source, from, expected, to);
      CAPTURE(name(from));
      CAPTURE(name(to));
      CHECK(on_device({{0, 0, {{count, static_cast<Index>(item), static_cast<Index>(size_of(to))}}, from, to}}, source, Bytes(expected.size())) == expected);
    }
}

TEST_CASE("columns cut from rows and back, a transpose, and a repeated row move as they should") {
  const auto kinds = [](const Box& box) {
    BoxList list;
    list.add(box);
    return std::array{list.runs().size(), list.casts().size(), list.tiles().size()};
  };
  const Box columns{64, 0, {{100, 256, 64}, {32, 2, 2}}, DType::BF16, DType::BF16};
  CHECK(kinds(columns) == std::array<std::size_t, 3>{1, 0, 0});
  BoxList list;
  list.add(columns);
  CHECK(list.runs()[0].unit == 16);
  check({columns}, 64 + 100 * 256, 6400);
  const Box transpose{0, 0, {{200, 2, 300}, {150, 400, 2}}, DType::F16, DType::F16};
  CHECK(kinds(transpose) == std::array<std::size_t, 3>{0, 0, 1});
  check({transpose}, 200 * 150 * 2, 200 * 150 * 2);
  const Box narrowed{0, 0, {{70, 4, 130}, {65, 280, 2}}, DType::F32, DType::BF16};
  CHECK(kinds(narrowed) == std::array<std::size_t, 3>{0, 0, 1});
  check({narrowed}, 70 * 65 * 4, 70 * 130);
  check({{0, 0, {{1100, 2, 132}, {66, 2200, 2}}, DType::BF16, DType::BF16}}, 145'200, 145'200);  // more tiles along the source than are in work together
  check({{0, 0, {{260, 1, 132}, {132, 260, 1}}, DType::F8E4M3, DType::F8E4M3}}, 260 * 132, 260 * 132);  // whole squares, as are those of the next
  check({{0, 0, {{260, 2, 132}, {132, 520, 1}}, DType::BF16, DType::F8E5M2}}, 260 * 264, 260 * 132);
  check({{8, 16, {{10, 0, 64}, {16, 4, 4}}, DType::F32, DType::F32}}, 8 + 64, 16 + 640);
  check({{0, 0, {{33, 0, 2}}, DType::F32, DType::BF16}}, 4, 66);
}

TEST_CASE("more boxes than one block, units beyond one block, nothing at all") {
  std::vector<Box> boxes;
  for (std::uint64_t i = 0; i < 500; ++i) boxes.push_back({i * 48, (499 - i) * 32, {{4, 12, 8}, {3, 2, 2}}, DType::I16, DType::I16});
  check(boxes, 500 * 48, 500 * 32);
  check({{0, 0, {{100'003, 1, 1}}, DType::U8, DType::U8}}, 100'003, 100'003);
  check({{0, 0, {{0, 1, 1}, {5, 1, 1}}, DType::U8, DType::U8}}, 16, 16);
  check({{16, 0, {{5, 32, 16}}, DType::C128, DType::C128}, {0, 80, {}, DType::I64, DType::I64}}, 16 + 5 * 32, 88);
}

TEST_CASE("quotients by products") {
  for (std::uint32_t d : {1u, 2u, 3u, 5u, 7u, 12u, 64u, 641u, 65535u, 65536u, 65537u, 0x7ffffffeu, 0x7fffffffu}) {
    const gpu::reshard::Divisor by(d);
    for (int i = 0; i < 1000; ++i) {
      const auto n = static_cast<std::uint32_t>(below(std::uint64_t{1} << 31));
      REQUIRE(by.of(n) == n / d);
    }
    for (const auto n : {0u, d - 1, d, 0x7fffffffu}) REQUIRE(by.of(n) == n / d);
  }
}
