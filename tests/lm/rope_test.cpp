// Rotary tables in every variant against formulas written out in f64.
#include "lm/cpu/ops.h"

#include "libshard/error.h"

#include <doctest/doctest.h>

#include <cmath>
#include <numbers>

using namespace lm;
using namespace lm::cpu;
using shard::RopeConfig;

namespace {

/// The frequency of pair i, read back from the sine at position 1.
double frequency(const RopeTable& table, Index i) {
  const auto at = static_cast<std::size_t>(table.half + i);
  return std::atan2(static_cast<double>(table.sin[at]), static_cast<double>(table.cos[at]));
}

RopeConfig config_of(RopeConfig::Type type, Index dim) {
  RopeConfig out;
  out.type = type;
  out.dim = dim;
  return out;
}

}  // namespace

TEST_CASE("default frequencies, partial lanes and the turn of halves") {
  const auto table = rope_table(config_of(RopeConfig::Type::Default, 8), 4);
  REQUIRE(table.half == 4);
  for (Index i = 0; i < 4; ++i) CHECK(frequency(table, i) == doctest::Approx(std::pow(10000.0, -2.0 * static_cast<double>(i) / 8)));
  Tensor x(4, 10);
  for (Index r = 0; r < 4; ++r)
    for (Index c = 0; c < 10; ++c) x.row(r)[c] = static_cast<float>(c + 1);
  apply_rope({Compute::F32, 1}, table, x.row(0), 4, 10, 1, 10, 4);
  CHECK(x.row(0)[0] == 1);
  CHECK(static_cast<double>(x.row(2)[0]) == doctest::Approx(std::cos(2.0) - 5 * std::sin(2.0)));
  CHECK(static_cast<double>(x.row(2)[4]) == doctest::Approx(5 * std::cos(2.0) + std::sin(2.0)));
  CHECK(x.row(3)[8] == 9);  // beyond the lanes that turn
}

TEST_CASE("interleaved lanes turn as neighbours, and rows start again in each sequence") {
  auto config = config_of(RopeConfig::Type::Default, 4);
  config.interleaved = true;
  const auto table = rope_table(config, 2);
  Tensor x(4, 4);
  for (Index r = 0; r < 4; ++r)
    for (Index c = 0; c < 4; ++c) x.row(r)[c] = static_cast<float>(c + 1);
  apply_rope({Compute::F32, 1}, table, x.row(0), 4, 4, 1, 4, 2);
  CHECK(static_cast<double>(x.row(1)[0]) == doctest::Approx(std::cos(1.0) - 2 * std::sin(1.0)));
  CHECK(x.row(2)[0] == 1);
  CHECK(x.row(3)[0] == x.row(1)[0]);
}

TEST_CASE("scaled variants") {
  auto linear = config_of(RopeConfig::Type::Linear, 8);
  linear.factor = 4;
  CHECK(frequency(rope_table(linear, 2), 1) == doctest::Approx(0.1 / 4));

  auto dynamic = config_of(RopeConfig::Type::Dynamic, 8);
  dynamic.factor = 2;
  dynamic.max_position = 4;
  CHECK(frequency(rope_table(dynamic, 2), 1) == doctest::Approx(0.1));  // not longer than the model's own reach
  const auto base = 10000 * std::pow(2 * 8 / 4.0 - 1, 8.0 / 6);
  CHECK(frequency(rope_table(dynamic, 8), 1) == doctest::Approx(std::pow(base, -0.25)));

  auto llama3 = config_of(RopeConfig::Type::Llama3, 8);
  llama3.factor = 8;
  llama3.original_max_position = 8192;
  const auto table = rope_table(llama3, 2);
  CHECK(frequency(table, 0) == doctest::Approx(1));
  const auto wave = 2 * std::numbers::pi / 0.001;
  const auto smooth = (8192 / wave - 1) / 3;
  CHECK(frequency(table, 3) == doctest::Approx((1 - smooth) * 0.001 / 8 + smooth * 0.001).epsilon(1e-4));

  auto longrope = config_of(RopeConfig::Type::LongRope, 4);
  longrope.short_factor = {1, 2};
  longrope.long_factor = {4, 8};
  longrope.original_max_position = 4;
  longrope.concentration = 1.25;
  CHECK(frequency(rope_table(longrope, 4), 1) == doctest::Approx(0.01 / 2).epsilon(1e-4));
  CHECK(frequency(rope_table(longrope, 5), 1) == doctest::Approx(0.01 / 8).epsilon(1e-4));
  CHECK(rope_table(longrope, 4).cos[0] == 1.25f);
  longrope.long_factor = {1};
  CHECK_THROWS_AS(rope_table(longrope, 5), shard::Error);
}

TEST_CASE("yarn blends between its two ends") {
  auto yarn = config_of(RopeConfig::Type::Yarn, 64);
  yarn.factor = 32;
  yarn.original_max_position = 4096;
  for (const bool truncate : {true, false}) {
    yarn.truncate = truncate;
    const auto table = rope_table(yarn, 2);
    const auto lane = [](double turns) { return 64 * std::log(4096 / (turns * 2 * std::numbers::pi)) / (2 * std::log(10000.0)); };
    const auto low = truncate ? std::floor(lane(32)) : lane(32), high = truncate ? std::ceil(lane(1)) : lane(1);
    for (Index i = 0; i < 32; ++i) {
      const auto plain = std::pow(10000.0, -2.0 * static_cast<double>(i) / 64);
      const auto ramp = std::min(1.0, std::max(0.0, (static_cast<double>(i) - low) / (high - low)));
      CHECK(frequency(table, i) == doctest::Approx(plain / 32 * ramp + plain * (1 - ramp)).epsilon(1e-4));
    }
  }
}

TEST_CASE("no rotation is an empty table") {
  CHECK(rope_table({}, 8).half == 0);
}
