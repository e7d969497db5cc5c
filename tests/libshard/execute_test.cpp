#include "libshard/execute.h"

#include "libshard/error.h"
#include "tests/libshard/random_checkpoint.h"

#include <doctest/doctest.h>

#include <algorithm>

using namespace shard;
using testing::Memory;
using testing::random_dict;

namespace {

Budget budget_of(unsigned threads, std::uint64_t memory) { return {threads, memory, nullptr}; }

}  // namespace

TEST_CASE("any boxes to any boxes, in any order of axes, with right sums and the same bytes for every budget") {
  for (std::uint32_t seed = 0; seed < 60; ++seed) {
    CAPTURE(seed);
    std::mt19937 random(seed);
    Memory source(random_dict(random, false));
    source.fill(seed);
    const auto layout = random_dict(random, true);
    std::vector<std::vector<std::byte>> first;
    for (const auto& budget : {budget_of(1, 1 << 20), budget_of(3, 64 << 10), budget_of(2, 256 << 20)}) {
      Memory target(layout);
      const auto plan = make_plan(source.describe(), target.describe());
      const auto report = execute(plan, source, target, formats::kernels(), budget);
      CHECK(report.findings.empty());
      for (const auto& [key, tensor] : layout.tensors) CHECK(target.whole(key) == source.whole(key));
      for (std::size_t s = 0; s < layout.streams.size(); ++s)
        if (layout.streams[s].summed) CHECK(report.crc32[s] == formats::kernels().crc32(target.bytes()[s]));
      if (first.empty()) first = target.bytes();
      CHECK(target.bytes() == first);
    }
  }
}

TEST_CASE("a plan cut into parts gives the same bytes") {
  std::mt19937 random(5);
  Memory source(random_dict(random, false));
  source.fill(1);
  Memory whole(random_dict(random, true)), parts(whole.describe());
  const auto plan = make_plan(source.describe(), whole.describe());
  const auto report = execute(plan, source, whole, formats::kernels(), budget_of(1, 1 << 20));
  std::vector<std::optional<std::uint32_t>> sums(report.crc32.size());
  std::size_t copies = 0;
  for (std::size_t i = 0; i < 3; ++i) {
    const auto part = part_of(plan, i, 3);
    copies += part.copies.size();
    const auto done = execute(part, source, parts, formats::kernels(), budget_of(1, 1 << 20));
    for (std::size_t s = 0; s < sums.size(); ++s)
      if (done.crc32[s]) sums[s] = done.crc32[s];
  }
  CHECK(copies == plan.copies.size());
  CHECK(parts.bytes() == whole.bytes());
  for (std::size_t s = 0; s < sums.size(); ++s)
    if (whole.describe().streams[s].summed && whole.describe().streams[s].size > 0) CHECK(sums[s] == report.crc32[s]);
}

TEST_CASE("a flipped byte is found, wherever the shards lie") {
  std::mt19937 random(9);
  Memory source(random_dict(random, false));
  source.fill(3);
  source.bytes()[0][source.bytes()[0].size() / 2] ^= std::byte{1};
  Memory target(random_dict(random, true));
  const auto report = execute(make_plan(source.describe(), target.describe()), source, target, formats::kernels(), budget_of(2, 1 << 20));
  REQUIRE(report.findings.size() == 1);
  CHECK(report.findings[0].rule == "checksum");
  CHECK_THROWS_AS(refuse(report.findings), Error);
}

TEST_CASE("holes, foreign shapes and types are refused by name") {
  std::mt19937 random(2);
  auto source = random_dict(random, false);
  auto target = random_dict(random, false);
  auto holed = source;
  holed.tensors["d"].shards.pop_back();
  CHECK_THROWS_WITH_AS(make_plan(holed, target), doctest::Contains("d: no shard"), Error);
  auto missing = source;
  missing.tensors.erase("a");
  CHECK_THROWS_WITH_AS(make_plan(missing, target), doctest::Contains("a: the target needs it"), Error);
  auto typed = target;
  typed.tensors["a"].dtype = DType::F16;
  CHECK_THROWS_AS(make_plan(source, typed), Error);
}

TEST_CASE("replicas that differ are located") {
  ShardedStateDict dict;
  dict.files = {"x", "y"};
  dict.streams = {{0, 0, 32, std::nullopt, false}, {1, 0, 32, std::nullopt, false}};
  dict.tensors["w"] = {"w", DType::BF16, {4, 4}, {4, 4}, {{whole({4, 4}), {0, 0, {8, 2}}, {}}, {whole({4, 4}), {1, 0, {8, 2}}, {0, 1, 0}}}, false};
  Memory source(dict);
  source.bytes()[1][13] = std::byte{1};  // element 6: [1, 2]
  ShardedStateDict one = dict;
  one.tensors["w"].shards.pop_back();
  Memory target(one);
  const auto report = execute(make_plan(source.describe(), one), source, target, formats::kernels(), budget_of(1, 1 << 20));
  REQUIRE(report.findings.size() == 1);
  CHECK(report.findings[0].rule == "replica");
  CHECK(report.findings[0].message.find("first at [1, 2]") != std::string::npos);
}

TEST_CASE("new vocabulary rows are filled, surplus ones cut") {
  ShardedStateDict small, large;
  small.files = large.files = {"f"};
  small.streams = {{0, 0, 24, std::nullopt, false}};
  large.streams = {{0, 0, 40, std::nullopt, true}};
  small.tensors["v"] = {"v", DType::F32, {3, 2}, {3, 2}, {{whole({3, 2}), {0, 0, {8, 4}}, {}}}, true};
  large.tensors["v"] = {"v", DType::F32, {5, 2}, {5, 2}, {{whole({5, 2}), {0, 0, {8, 4}}, {}}}, true};
  Memory source(small);
  const float rows[] = {1, 2, 3, 4, 5, 6};
  std::memcpy(source.bytes()[0].data(), rows, sizeof rows);
  const auto values = [&](Pad pad) {
    Memory target(large);
    const auto plan = make_plan(source.describe(), large, {pad, false, [](const ShardedTensor&) {
                                  const float mean[] = {3, 4};
                                  std::vector<std::byte> out(8);
                                  std::memcpy(out.data(), mean, 8);
                                  return out;
                                }});
    CHECK(plan.filled == std::vector<std::string>{"v"});
    const auto report = execute(plan, source, target, formats::kernels(), budget_of(2, 1 << 20));
    CHECK(report.crc32[0] == formats::kernels().crc32(target.bytes()[0]));
    std::vector<float> out(10);
    std::memcpy(out.data(), target.bytes()[0].data(), 40);
    return out;
  };
  CHECK(values(Pad::Zeros) == std::vector<float>{1, 2, 3, 4, 5, 6, 0, 0, 0, 0});
  CHECK(values(Pad::Last) == std::vector<float>{1, 2, 3, 4, 5, 6, 5, 6, 5, 6});
  CHECK(values(Pad::Mean) == std::vector<float>{1, 2, 3, 4, 5, 6, 3, 4, 3, 4});
  Memory target(small), big(large);
  execute(make_plan(big.describe(), small), big, target, formats::kernels(), budget_of(1, 1 << 20));
  CHECK(target.whole("v").size() == 24);
}

TEST_CASE("sums join in any order") {
  std::mt19937 random(1);
  std::vector<std::byte> bytes(1000);
  for (auto& byte : bytes) byte = static_cast<std::byte>(random());
  std::vector<std::pair<std::size_t, std::size_t>> pieces;
  for (std::size_t at = 0; at < bytes.size();) {
    const auto length = std::min(bytes.size() - at, 1 + random() % 60);
    pieces.emplace_back(at, length);
    at += length;
  }
  std::shuffle(pieces.begin(), pieces.end(), random);
  StreamSum sum;
  const auto& kernels = formats::kernels();
  for (const auto& [at, length] : pieces) {
    CHECK_FALSE(sum.gaps(bytes.size()).empty());
    sum.add(at, length, kernels.crc32(std::span(bytes).subspan(at, length)), kernels.combine);
    sum.add(at, length, 0, kernels.combine);  // read again: ignored
  }
  CHECK(sum.gaps(bytes.size()).empty());
  CHECK(sum.whole() == kernels.crc32(bytes));
}
