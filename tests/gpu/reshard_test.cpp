// The device's executor against the CPU's, on random plans: bytes, sums and findings.
#include "gpu/reshard/execute.h"
#include "gpu/reshard/scan.h"
#include "libshard/error.h"
#include "libshard/inspectors.h"
#include "libshard/numeric.h"
#include "tests/libshard/random_checkpoint.h"

#include <doctest/doctest.h>

using namespace shard;
using testing::Memory;
using testing::random_dict;

namespace {

constexpr std::uint64_t kSmall = 1;  ///< the least that is possible
Budget budget_of(unsigned threads, std::uint64_t memory) { return {threads, memory, nullptr}; }

bool same(const std::vector<Finding>& a, const std::vector<Finding>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const Finding& x, const Finding& y) { return x.rule == y.rule && x.key == y.key && x.message == y.message; });
}

/// Both executors on one plan; the device's outcome comes back.
gpu::reshard::Outcome check(const Plan& plan, const Memory& source, const ShardedStateDict& layout, const Budget& budget) {
  Memory expected(layout), target(layout);
  const auto report = execute(plan, source, expected, formats::kernels(), budget_of(2, 1 << 20));
  auto outcome = gpu::reshard::execute(plan, source, target, formats::kernels(), budget, {});
  CHECK(target.bytes() == expected.bytes());
  CHECK(outcome.report.crc32 == report.crc32);
  CHECK(outcome.report.bytes_written == report.bytes_written);
  CHECK(outcome.report.bytes_through_device + outcome.report.bytes_copied_in_kernel == report.bytes_written);
  CHECK(same(outcome.report.findings, report.findings));
  return outcome;
}

}  // namespace

TEST_CASE("any boxes to any boxes on the device, for every budget") {
  for (std::uint32_t seed = 0; seed < 40; ++seed) {
    CAPTURE(seed);
    std::mt19937 random(seed);
    Memory source(random_dict(random, false));
    source.fill(seed);
    const auto layout = random_dict(random, true);
    const auto plan = make_plan(source.describe(), layout);
    for (const auto& budget : {budget_of(1, kSmall), budget_of(3, 3 << 20), budget_of(4, 256 << 20)}) check(plan, source, layout, budget);
  }
}

TEST_CASE("casts on the way, as the CPU casts") {
  constexpr DType kTypes[] = {DType::F64, DType::F32, DType::F16, DType::BF16, DType::F8E4M3, DType::F8E5M2};
  for (std::uint32_t seed = 100; seed < 130; ++seed) {
    CAPTURE(seed);
    std::mt19937 random(seed);
    const auto typed = [&](ShardedStateDict dict) {  // strides stretched by the widest element leave room for any
      for (auto& [key, tensor] : dict.tensors) {
        const auto old = static_cast<Index>(size_of(tensor.dtype));
        tensor.dtype = kTypes[random() % 6];
        for (auto& shard : tensor.shards) {
          for (auto& stride : shard.place.stride) stride = stride / old * static_cast<Index>(size_of(tensor.dtype));
          shard.place.offset *= 8;
        }
      }
      for (auto& stream : dict.streams) stream.size *= 8;
      return dict;
    };
    Memory source(typed(random_dict(random, false)));
    source.fill(seed);
    const auto layout = typed(random_dict(random, true));
    check(make_plan(source.describe(), layout, {Pad::Zeros, true, {}}), source, layout, budget_of(2, seed % 2 ? kSmall : 16 << 20));
  }
}

TEST_CASE("what is wrong with the source is found on the device in the same words") {
  std::mt19937 random(9);
  Memory flipped(random_dict(random, false));
  flipped.fill(3);
  flipped.bytes()[0][flipped.bytes()[0].size() / 2] ^= std::byte{1};
  const auto layout = random_dict(random, true);
  CHECK(check(make_plan(flipped.describe(), layout), flipped, layout, budget_of(2, kSmall)).report.findings.size() == 1);

  ShardedStateDict dict;
  dict.files = {"x", "y"};
  const Index rows = 300, columns = 500;
  const Index pitch = 2 * columns + 10;  // the copy lies among other things
  const auto bytes = static_cast<std::uint64_t>(rows * columns * 2);
  dict.streams = {{0, 0, bytes, std::nullopt, false}, {1, 0, static_cast<std::uint64_t>(rows * pitch), std::nullopt, false}};
  dict.tensors["w"] = {"w", DType::BF16, {rows, columns}, {rows, columns}, {{whole({rows, columns}), {0, 0, {columns * 2, 2}}, {}}, {whole({rows, columns}), {1, 0, {pitch, 2}}, {0, 1, 0}}}, false};
  Memory source(dict);
  for (std::size_t i = 0; i < bytes; ++i) source.bytes()[0][i] = static_cast<std::byte>(i * 7 % 251);
  for (Index r = 0; r < rows; ++r)
    std::memcpy(source.bytes()[1].data() + r * pitch, source.bytes()[0].data() + r * 2 * columns, 2 * columns);
  auto one = dict;
  one.tensors["w"].shards.pop_back();
  CHECK(check(make_plan(source.describe(), one), source, one, budget_of(2, kSmall)).report.findings.empty());
  for (const Index at : {211 * pitch + 2 * 137, 299 * pitch + 2 * 499}) source.bytes()[1][static_cast<std::size_t>(at)] ^= std::byte{4};
  const auto found = check(make_plan(source.describe(), one), source, one, budget_of(2, kSmall)).report.findings;
  REQUIRE(found.size() == 1);
  CHECK(found[0].message.find("differ in 2 elements, first at [211, 137]") != std::string::npos);
}

TEST_CASE("buffers keep to both budgets, and say what they need where they cannot") {
  std::mt19937 random(1);
  Memory source(random_dict(random, false));
  source.fill(1);
  const auto layout = random_dict(random, true);
  const auto plan = make_plan(source.describe(), layout);
  Memory target(layout);
  for (const std::uint64_t memory : {1 << 20, 5 << 20, 64 << 20}) {
    const auto outcome = gpu::reshard::execute(plan, source, target, formats::kernels(), budget_of(8, memory), {});
    CHECK(outcome.sizes.pinned_memory <= memory);
    const auto bounded = gpu::reshard::execute(plan, source, target, formats::kernels(), budget_of(8, 256 << 20), {.device_memory = memory});
    CHECK(bounded.sizes.device_memory <= memory);
  }
  CHECK_THROWS_WITH_AS(gpu::reshard::execute(plan, source, target, formats::kernels(), budget_of(8, 1 << 20), {.device_memory = 1000}), doctest::Contains("is the least"), Error);
  const std::atomic<bool> stop = true;
  CHECK_THROWS_WITH_AS(gpu::reshard::execute(plan, source, target, formats::kernels(), {2, 1 << 20, &stop}, {}), "stopped by a signal", Error);
}

TEST_CASE("a scan finds the same on the device, in any layout") {
  for (std::uint32_t seed = 0; seed < 30; ++seed) {
    CAPTURE(seed);
    std::mt19937 random(seed);
    auto dict = random_dict(random, false);
    auto& tensor = dict.tensors.at("a");  // a copy of one shard, as replicas are
    auto copy = tensor.shards[0];
    copy.replica_id = {0, 1, 0};
    dict.streams.push_back({0, 0, dict.streams[copy.place.stream].size, std::nullopt, false});
    const auto original = copy.place.stream;
    copy.place.stream = static_cast<std::uint32_t>(dict.streams.size() - 1);
    tensor.shards.push_back(copy);
    Memory source(dict);
    source.fill(seed);  // of noise one number in 256 is not finite
    if (seed % 2) source.bytes().back() = source.bytes()[original];
    const auto replicas = compare_replicas(dict);
    const auto expected = scan_bytes(source, source.describe(), replicas, formats::kernels(), budget_of(2, 16 << 20));
    CHECK(expected.size() >= 3);
    for (const auto& budget : {budget_of(1, kSmall), budget_of(3, 64 << 20)})
      CHECK(same(gpu::reshard::scan_bytes(source, source.describe(), replicas, formats::kernels(), budget, {}).findings, expected));
  }
}
