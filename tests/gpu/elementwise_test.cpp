// Elementwise ops against the CPU's. What adds or multiplies once is equal bit by bit; functions are within 4 ULP or so of f32.
#include "gpu/ops/elementwise.h"

#include "libshard/error.h"
#include "tests/gpu/cpu_meaning.h"

using namespace meaning;

namespace {

constexpr Index kShapes[][2] = {{1, 1}, {1, 40}, {7, 33}, {33, 96}};

}  // namespace

TEST_CASE("add, scale, scale_rows, bias and fill are equal to the CPU's") {
  for (const auto& mode : kModes)
    for (const auto& [rows, columns] : kShapes)
      for (const Index gap : {0, 3}) {
        CAPTURE(mode.bf16());
        CAPTURE(rows);
        CAPTURE(columns);
        CAPTURE(gap);
        auto a = random_tensor(mode, rows, columns);
        const auto b = random_tensor(mode, rows, columns), bias = random_tensor(mode, 1, columns);
        const OnDevice x(a, mode.type, columns + gap), y(b, mode.type), beta(bias, mode.type);
        std::vector<float> w;
        for (Index r = 0; r < rows; ++r) w.push_back(random_value());
        const Values<float> weights(w);

        gpu::add(stream(), x.view(), y.view());
        lm::cpu::add(mode.on(), a, b);
        CHECK(worst(x.get(), a) == 0);

        gpu::scale(stream(), x.view(), 0.3);
        lm::cpu::scale(mode.on(), a, 0.3);
        CHECK(worst(x.get(), a) == 0);

        gpu::scale_rows(stream(), x.view(), weights.data());
        for (Index r = 0; r < rows; ++r)
          for (Index c = 0; c < columns; ++c) a.row(r)[c] *= w[static_cast<std::size_t>(r)];
        lm::cpu::round_values(mode.on(), a.values());
        CHECK(worst(x.get(), a) == 0);

        gpu::add_weighted_bias(stream(), x.view(), beta.view(), weights.data());
        for (Index r = 0; r < rows; ++r)
          for (Index c = 0; c < columns; ++c) a.row(r)[c] += bias.row(0)[c] * w[static_cast<std::size_t>(r)];
        lm::cpu::round_values(mode.on(), a.values());
        CHECK(worst(x.get(), a) <= bound(mode, 2e-7));  // a product and its sum are rounded once here

        gpu::fill(stream(), x.view(), 0.5f);
        for (auto& value : a.values()) value = 0.5f;
        CHECK(worst(x.get(), a) == 0);
      }
}

TEST_CASE("softcap and the gate of rows are the CPU's within 1e-6 of f32 or one rounding of bf16") {
  for (const auto& mode : kModes)
    for (const auto& [rows, columns] : kShapes) {
      auto a = random_tensor(mode, rows, columns, 20);
      const auto open = random_tensor(mode, rows, 1, 3);
      const OnDevice x(a, mode.type), gate(open, mode.type);
      gpu::softcap(stream(), x.view(), 15);
      lm::cpu::softcap(mode.on(), a, 15);
      CHECK(worst(x.get(), a) <= bound(mode, 1e-6));
      OnDevice z(a, mode.type);
      gpu::gate_rows(stream(), z.view(), gate.view());
      for (Index r = 0; r < rows; ++r)
        for (Index c = 0; c < columns; ++c) a.row(r)[c] *= 1.0f / (1.0f + std::exp(-open.row(r)[0]));
      lm::cpu::round_values(mode.on(), a.values());
      CHECK(worst(z.get(), a) <= bound(mode, 1e-6));
    }
}

TEST_CASE("activations, gated or not, clamped or not, are the CPU's") {
  using enum shard::Activation;
  for (const auto& mode : kModes)
    for (const auto kind : {Silu, GeluErf, GeluTanh, Relu, SquaredRelu, QuickGelu})
      for (const bool gated : {false, true})
        for (const bool clamped : {false, true}) {
          CAPTURE(mode.bf16());
          CAPTURE(static_cast<int>(kind));
          CAPTURE(gated);
          CAPTURE(clamped);
          shard::TransformerConfig config;
          config.activation = kind;
          config.activation_alpha = 1.5;
          config.glu_linear_offset = clamped ? 1 : 0;
          if (clamped) config.activation_clamp = 0.7;
          const auto gate = random_tensor(mode, 7, 40, 2);
          auto up = random_tensor(mode, 7, 40, 2);
          // Both are columns of one matrix, as where a product makes them together.
          Tensor both(7, 80);
          for (Index r = 0; r < 7; ++r) std::copy(up.row(r), up.row(r) + 40, std::copy(gate.row(r), gate.row(r) + 40, both.row(r)));
          const OnDevice x(both, mode.type);
          gpu::activate(stream(), gpu::activation_config(config), gated ? x.view().column_range(0, 40) : gpu::View{}, x.view().column_range(40, 40));
          lm::cpu::activate(mode.on(), config, gated ? &gate : nullptr, up);
          const auto out = x.get();
          Tensor mine(7, 40);
          for (Index r = 0; r < 7; ++r) std::copy(out.row(r) + 40, out.row(r) + 80, mine.row(r));
          CHECK(worst(mine, up) <= bound(mode, 2e-6));
        }
}

TEST_CASE("conversions round to nearest even and widen exactly") {
  const auto exact = random_tensor(kModes[0], 7, 33);
  const OnDevice f32(exact, shard::DType::F32);
  for (const auto type : {shard::DType::BF16, shard::DType::F16}) {
    const OnDevice as_rounded(exact, type), made(7, 33, type), back(7, 33, shard::DType::F32);
    gpu::convert(stream(), made.view(), f32.view());
    CHECK(worst(made.get(), as_rounded.get()) == 0);
    gpu::convert(stream(), back.view(), made.view());
    CHECK(worst(back.get(), as_rounded.get()) == 0);
  }
}

TEST_CASE("shapes and types that do not fit together are refused") {
  const OnDevice a(2, 3, shard::DType::F32), b(2, 4, shard::DType::F32), c(2, 3, shard::DType::BF16), d(2, 3, shard::DType::I32);
  CHECK_THROWS_AS(gpu::add(stream(), a.view(), b.view()), shard::Error);
  CHECK_THROWS_AS(gpu::add(stream(), a.view(), c.view()), shard::Error);
  CHECK_THROWS_AS(gpu::scale(stream(), d.view(), 2), shard::Error);
}
