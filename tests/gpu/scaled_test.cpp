// Products in fp8 beside what lm/cpu makes of the same blocks: ends of blocks, parts that begin within one, experts, a library's kernel.
#include "gpu/model/scaled_products.h"
#include "libshard/error.h"
#include "lm/scaled_blocks.h"
#include "tests/gpu/cpu_meaning.h"
#include "tests/gpu/libraries.h"

#include <cstring>

using namespace meaning;

namespace {

constexpr lm::Compute kFp8 = lm::Compute::Fp8;
const lm::cpu::Context kOn{kFp8, 1};

/// A weight as products in fp8 take it, whole on the host.
struct Scaled {
  explicit Scaled(const Tensor& values) : across(lm::blocks_of(values.columns())) {
    const auto rows = values.rows(), columns = values.columns();
    std::shared_ptr<std::byte> numbers(new std::byte[static_cast<std::size_t>(rows * columns)], std::default_delete<std::byte[]>()),
        factors(new std::byte[static_cast<std::size_t>(lm::blocks_of(rows) * across) * sizeof(float)], std::default_delete<std::byte[]>());
    for (Index lo = 0; lo < rows; lo += lm::kScaleBlock)
      lm::quantise_block_row(values.row(lo), std::min(lm::kScaleBlock, rows - lo), columns, numbers.get() + lo * columns, reinterpret_cast<float*>(factors.get()) + lo / lm::kScaleBlock * across);
    weight = {numbers, numbers.get(), shard::DType::F8E4M3, rows, columns, columns};
    scales = {factors, factors.get(), shard::DType::F32, lm::blocks_of(rows), across, across};
  }
  Index across;
  lm::Weight weight, scales;
};

/// Rows and columns of it in device memory.
struct Part {
  Part(const Scaled& of, Index row, Index rows, Index column, Index columns)
      : on_host{of.weight.row_range(row, rows).column_range(column, columns), {}, of.scales}, memory(static_cast<std::size_t>(rows * columns)),
        factors(std::vector<float>(reinterpret_cast<const float*>(of.scales.data), reinterpret_cast<const float*>(of.scales.data) + of.scales.rows * of.across)) {
    std::vector<std::byte> packed(memory.size());
    for (Index r = 0; r < rows; ++r) std::memcpy(packed.data() + r * columns, on_host.weight.row_range(r, 1).data, static_cast<std::size_t>(columns));
    gpu::to_device(memory.data(), packed.data(), packed.size(), stream());
    stream().wait();
    view = {{memory.data(), shard::DType::F8E4M3, rows, columns, columns}, factors.data() + row / 128 * of.across + column / 128, of.across, row % 128, column % 128};
  }
  lm::Linear on_host;
  gpu::DeviceBuffer memory;
  Values<float> factors;
  gpu::ScaledWeight view;
};

/// Activations in device memory.
struct Input {
  Input(const Tensor& x, shard::DType type, Index first)
      : in(x, type, x.columns() + 8), numbers(x.rows(), x.columns(), shard::DType::F8E4M3, (x.columns() + 15) / 16 * 16),
        factors(static_cast<std::size_t>(lm::blocks_of(x.columns(), first) * ((x.rows() + 3) / 4 * 4))),
        view{numbers.view(), factors.data(), (x.rows() + 3) / 4 * 4, first} {
    gpu::quantise_rows(stream(), in.view(), view);
  }
  OnDevice in, numbers;
  Values<float> factors;
  gpu::ScaledRows view;
};

/// In bf16, of sizes that differ from block to block and by more than e4m3 spans; a block of zeros.
Tensor uneven(Index rows, Index columns) {
  auto out = random_tensor(kModes[1], rows, columns);
  for (Index r = 0; r < rows; ++r)
    for (Index c = 0; c < columns; ++c) {
      out.row(r)[c] *= std::exp2(static_cast<float>((r / 3 + c / 16) % 24 - 12));
      if (c / 128 == 1 && r % 5 == 0) out.row(r)[c] = 0;
    }
  lm::cpu::round_values(kModes[1].on(), out.values());
  return out;
}

}  // namespace

TEST_CASE("activations become the numbers that the CPU's products in fp8 see, bit for bit") {
  for (const auto type : {shard::DType::BF16, shard::DType::F32})
    for (const auto& [rows, columns, first] : {std::array<Index, 3>{1, 16, 0}, {5, 128, 0}, {7, 300, 0}, {7, 300, 40}, {3, 130, 127}}) {
      const auto x = uneven(rows, columns);
      const Input input(x, type, first);
      const auto numbers = input.numbers.get();
      const auto scales = input.factors.get();
      auto expected = x.clone();
      for (Index r = 0; r < rows; ++r) {
        lm::round_e4m3_blocks(expected.row(r), columns, first);
        for (Index c = 0; c < columns; ++c) CHECK(numbers.row(r)[c] * scales[static_cast<std::size_t>((first + c) / 128 * input.view.scale_pitch + r)] == expected.row(r)[c]);
      }
    }
}

TEST_CASE("what is not finite poisons its products on a device as on the host") {
  for (const float bad : {INFINITY, std::nanf("")}) {
    auto x = random_tensor(kModes[1], 4, 256);
    x.row(2)[130] = bad;
    const Input input(x, shard::DType::BF16, 0);
    const Scaled whole(random_tensor(kModes[1], 16, 256, 0.3f));
    const Part part(whole, 0, 16, 0, 256);
    const OnDevice out(4, 16, shard::DType::BF16);
    gpu::scaled_linear(stream(), input.view, part.view, {}, out.view());
    Tensor expected(4, 16);
    lm::cpu::linear(kOn, lm::cpu::Packed(kOn, x), part.on_host, expected);
    CHECK(worst(out.get(), expected) <= bound(kModes[1], 0));
    CHECK(std::isnan(expected.row(2)[0]));
    CHECK(std::isfinite(expected.row(1)[0]));
  }
}

TEST_CASE("products in fp8 are the CPU's within one rounding, of whole weights and of parts that begin anywhere in a block") {
  for (const Index tokens : {1, 7, 68})
    for (const auto& [row, rows, column, columns] : {std::array<Index, 4>{0, 300, 0, 520}, {0, 16, 0, 64}, {100, 140, 0, 520}, {0, 300, 130, 300}, {130, 20, 17, 33}, {256, 44, 384, 136}})
      for (const bool biased : {false, true}) {
        CAPTURE(tokens);
        CAPTURE(row);
        CAPTURE(column);
        const Scaled whole(uneven(300, 520));
        const Part part(whole, row, rows, column, columns);
        const auto x = random_tensor(kModes[1], tokens, columns), b = random_tensor(kModes[1], 1, rows);
        const OnDevice bias(b, shard::DType::BF16), out(tokens, rows + 3, shard::DType::BF16);
        const Input input(x, shard::DType::BF16, column % 128);
        gpu::scaled_linear(stream(), input.view, part.view, biased ? bias.view() : gpu::View{}, out.view().column_range(3, rows));
        Tensor expected(tokens, rows), mine(tokens, rows);
        auto by = part.on_host;
        if (biased) by.bias = weight_of(b, shard::DType::BF16);
        lm::cpu::linear(kOn, lm::cpu::Packed(kOn, x), by, expected);
        const auto all = out.get();
        for (Index r = 0; r < tokens; ++r) std::copy(all.row(r) + 3, all.row(r) + 3 + rows, mine.row(r));
        CHECK(worst(mine, expected) <= bound(kModes[1], 0));
      }
}

TEST_CASE("products in fp8 of few rows are the CPU's within one rounding, several at once") {
  for (const Index tokens : {1, 5, 8, 9, 16})
    for (const auto& [column, columns] : {std::array<Index, 2>{0, 16}, {0, 1040}, {48, 992}, {112, 3104}}) {
      CAPTURE(tokens);
      CAPTURE(columns);
      const auto x = random_tensor(kModes[1], tokens, columns), b = random_tensor(kModes[1], 1, 300);
      const Input input(x, shard::DType::BF16, column % 128);
      const OnDevice bias(b, shard::DType::BF16);
      const Scaled whole(uneven(300, column + columns));
      std::vector<Part> parts;
      std::vector<OnDevice> outs;
      std::vector<gpu::ScaledViews> views;
      for (const auto& [row, rows] : {std::array<Index, 2>{0, 300}, {100, 70}, {128, 16}, {299, 1}, {7, 33}}) {  // more than one launch
        parts.emplace_back(whole, row, rows, column, columns);
        outs.emplace_back(tokens, rows + 3, shard::DType::BF16);
        CHECK(gpu::is_thin(input.view, parts.back().view));
        views.push_back({parts.back().view, rows == 300 ? bias.view() : gpu::View{}, outs.back().view().column_range(3, rows)});
      }
      gpu::thin_scaled_linears(stream(), input.view, views);
      for (std::size_t i = 0; i < parts.size(); ++i) {
        const auto rows = parts[i].on_host.weight.rows;
        Tensor expected(tokens, rows), mine(tokens, rows);
        auto by = parts[i].on_host;
        if (rows == 300) by.bias = weight_of(b, shard::DType::BF16);
        lm::cpu::linear(kOn, lm::cpu::Packed(kOn, x), by, expected);
        const auto all = outs[i].get();
        for (Index r = 0; r < tokens; ++r) std::copy(all.row(r) + 3, all.row(r) + 3 + rows, mine.row(r));
        CHECK(worst(mine, expected) <= bound(kModes[1], 0));
      }
    }
  const Scaled whole(random_tensor(kModes[1], 16, 40));
  const Part odd(whole, 0, 16, 0, 40);
  const Input narrow(random_tensor(kModes[1], 4, 40), shard::DType::BF16, 0);
  CHECK(!gpu::is_thin(narrow.view, odd.view));
  stream().wait();  // `narrow` ends here
}

TEST_CASE("experts in fp8 are linears of their own rows") {
  constexpr Index kInputs = 200, kOutputs = 150;
  const std::vector<std::int32_t> offsets{0, 3, 3, 70, 71}, tiles{0, 1, 1, 3, 4};
  std::vector<Scaled> wholes;
  std::vector<Part> parts;
  std::vector<OnDevice> biases;
  std::vector<const std::byte*> data, bias;
  std::vector<const float*> scales;
  for (int e = 0; e < 4; ++e) {
    wholes.emplace_back(uneven(kOutputs + 64, kInputs));
    parts.emplace_back(wholes.back(), 64, kOutputs, 0, kInputs);
    const auto b = random_tensor(kModes[1], 1, kOutputs);
    biases.emplace_back(b, shard::DType::BF16);
    parts.back().on_host.bias = weight_of(b, shard::DType::BF16);
    data.push_back(parts.back().memory.data()), bias.push_back(biases.back().view().data), scales.push_back(parts.back().view.scales);
  }
  const auto x = random_tensor(kModes[1], 71, kInputs);
  const Input input(x, shard::DType::BF16, 0);
  const OnDevice out(71, kOutputs, shard::DType::BF16);
  const Values<const std::byte*> weights_at(data), biases_at(bias);
  const Values<const float*> scales_at(scales);
  const Values<std::int32_t> offsets_at(offsets), tiles_at(tiles);
  gpu::grouped_scaled_linear(stream(), input.view, {weights_at.data(), biases_at.data(), shard::DType::BF16, kOutputs, kInputs, kInputs}, scales_at.data(), parts[0].view, 4,
                             offsets_at.data(), tiles_at.data(), nullptr, out.view());
  const auto found = out.get();
  for (std::size_t e = 0; e < 4; ++e) {
    const Index lo = offsets[e], count = offsets[e + 1] - lo;
    if (count == 0) continue;
    Tensor mine(count, kInputs), expected(count, kOutputs), got(count, kOutputs);
    for (Index r = 0; r < count; ++r) {
      std::copy(x.row(lo + r), x.row(lo + r) + kInputs, mine.row(r));
      std::copy(found.row(lo + r), found.row(lo + r) + kOutputs, got.row(r));
    }
    lm::cpu::linear(kOn, lm::cpu::Packed(kOn, mine), parts[e].on_host, expected);
    CHECK(worst(got, expected) <= bound(kModes[1], 0));
  }
}

TEST_CASE("fp8 takes blocks that begin together") {
  const Scaled whole(random_tensor(kModes[1], 16, 256));
  const Part part(whole, 0, 16, 64, 128);
  const Input input(random_tensor(kModes[1], 4, 128), shard::DType::BF16, 0);
  const OnDevice out(4, 16, shard::DType::BF16);
  CHECK_THROWS_WITH_AS(gpu::scaled_linear(stream(), input.view, part.view, {}, out.view()), doctest::Contains("64"), shard::Error);
  stream().wait();  // `input` ends here
}

#ifdef SHARDKIT_LIBRARIES
TEST_CASE("cuBLASLt multiplies in fp8 where its first product is ours, shapes that it does not take are ours") {
  gpu::Matmul library(0, libraries::cublaslt());
  gpu::ScaledProducts products(&library, stream());
  MESSAGE(products.by());
#ifndef SHARDKIT_ON_DEVICE
  CHECK(products.by().starts_with("cuBLASLt"));
#endif
  gpu::ScaledProducts own(nullptr, stream());
  CHECK(own.by() == "own kernels");
  for (const auto& [tokens, outputs, inputs] : {std::array<Index, 3>{8, 272, 512}, {12, 128, 1024}, {7, 272, 512}, {8, 272, 640}, {8, 250, 512}}) {
    const Scaled whole(uneven(outputs, inputs));
    const Part part(whole, 0, outputs, 0, inputs);
    const Input input(random_tensor(kModes[1], tokens, inputs), shard::DType::BF16, 0);
    const OnDevice a(tokens, outputs, shard::DType::BF16), b(tokens, outputs, shard::DType::BF16);
    products(input.view, part.view, {}, a.view(), stream());
    own(input.view, part.view, {}, b.view(), stream());
    CHECK(worst(a.get(), b.get()) <= 1.0 / 64);
  }
}
#endif
