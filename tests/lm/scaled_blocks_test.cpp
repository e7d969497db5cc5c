// Which weights are e4m3 in fp8, what their numbers and scales are, and which scales a rank's part needs.
#include "lm/scaled_blocks.h"


#include <doctest/doctest.h>

#include <cmath>
#include <random>

using namespace lm;

TEST_CASE("a layer's linears are e4m3 in fp8, and nothing else") {
  for (const auto* name : {"layers.0.attention.q.weight", "layers.11.attention.kv_up.weight", "layers.3.attention.out.weight", "layers.0.mlp.gate.weight", "layers.0.mlp.experts.7.down.weight", "layers.0.mlp.shared.up.weight",
                           "mtp.0.layer.attention.q_down.weight"}) {
    CHECK(is_block_scaled(name));
    CHECK(weight_of_scales(scales_of(name)) == name);
  }
  for (const auto* name : {"layers.0.attention.q.bias", "layers.0.attention.q_norm.weight", "layers.0.mlp.router.weight", "layers.0.mlp.shared.gate_weight", "layers.0.mlp.norm.weight", "embedding.word.weight", "output.weight",
                           "mtp.0.eh_proj.weight", "final_norm.weight"}) {
    CHECK(!is_block_scaled(name));
    CHECK(weight_of_scales(scales_of(name)).empty());
  }
}

TEST_CASE("numbers are within half a step of what they were, the largest of a block is 448, zeros stay zeros") {
  constexpr Index kRows = 5, kColumns = 300;
  std::mt19937 random(3);
  std::vector<float> from(kRows * kColumns);
  for (std::size_t i = 0; i < from.size(); ++i) from[i] = i % kColumns / 128 == 1 ? 0.0f : std::ldexp(std::normal_distribution<float>()(random), static_cast<int>(random() % 8) - 20);
  std::vector<std::byte> numbers(from.size());
  std::vector<float> scales(3);
  quantise_block_row(from.data(), kRows, kColumns, numbers.data(), scales.data());
  std::vector<float> back(from.size());
  const Weight weight{{}, numbers.data(), shard::DType::F8E4M3, kRows, kColumns, kColumns}, factors{{}, reinterpret_cast<const std::byte*>(scales.data()), shard::DType::F32, 1, 3, 3};
  widen_scaled(weight, factors, 0, kRows, back.data());
  CHECK(scales[1] == 1);
  for (std::size_t i = 0; i < from.size(); ++i) {
    const auto scale = scales[i % kColumns / 128];
    CHECK(std::abs(back[i] - from[i]) <= std::max(std::abs(from[i]) / 16, scale * 0x1p-10f));  // three bits of mantissa; multiples of 2^-9 below 2^-6
  }
  for (Index block : {0, 2}) {
    int most = 0;
    for (Index r = 0; r < kRows; ++r)
      for (Index c = block * 128; c < std::min((block + 1) * 128, kColumns); ++c) most = std::max(most, static_cast<int>(numbers[static_cast<std::size_t>(r * kColumns + c)]) & 127);
    CHECK(most == 0x7e);
  }
}

TEST_CASE("numbers too small to be divided by become zeros, not NaN") {
  const std::vector<float> from{1e-44f, -3e-45f, 0.0f, 1e-41f};
  std::vector<std::byte> numbers(from.size());
  float scale = 0;
  quantise_block_row(from.data(), 1, 4, numbers.data(), &scale);
  CHECK(scale == std::numeric_limits<float>::min());
  for (const auto number : numbers) CHECK((number & std::byte{0x7f}) < std::byte{0x08});  // below 2^-6
  auto row = from;
  round_e4m3_blocks(row.data(), 4, 0);
  for (const auto value : row) CHECK(std::isfinite(value));
}

TEST_CASE("a part of a weight is widened as the whole is") {
  constexpr Index kRows = 200, kColumns = 270;
  std::vector<float> from(kRows * kColumns), whole(from.size());
  for (std::size_t i = 0; i < from.size(); ++i) from[i] = std::sin(static_cast<float>(i)) * static_cast<float>(1 + i / 5000);
  std::vector<std::byte> numbers(from.size());
  std::vector<float> scales(6);
  for (Index lo = 0; lo < kRows; lo += kScaleBlock) quantise_block_row(from.data() + lo * kColumns, std::min(kScaleBlock, kRows - lo), kColumns, numbers.data() + lo * kColumns, scales.data() + lo / kScaleBlock * 3);
  const Weight weight{{}, numbers.data(), shard::DType::F8E4M3, kRows, kColumns, kColumns}, factors{{}, reinterpret_cast<const std::byte*>(scales.data()), shard::DType::F32, 2, 3, 3};
  widen_scaled(weight, factors, 0, kRows, whole.data());
  const auto part = weight.row_range(130, 40).column_range(100, 90);
  std::vector<float> mine(40 * 90);
  widen_scaled(part, factors.row_range(1, 1).column_range(0, 2), 0, 40, mine.data());
  for (Index r = 0; r < 40; ++r)
    for (Index c = 0; c < 90; ++c) CHECK(mine[static_cast<std::size_t>(r * 90 + c)] == whole[static_cast<std::size_t>((130 + r) * kColumns + 100 + c)]);
}
