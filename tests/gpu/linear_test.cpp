// Products against the CPU's: f32 sums in another order.
#include "gpu/ops/linear.h"

#include "libshard/error.h"
#include "tests/gpu/cpu_meaning.h"

using namespace meaning;

TEST_CASE("linear is the CPU's within 2e-6 of f32 or one rounding of bf16, into columns of a wider output") {
  for (const auto& mode : kModes)
    for (const auto& [tokens, features, outputs] : {std::array<Index, 3>{1, 40, 7}, {7, 33, 70}, {70, 200, 150}})
      for (const bool biased : {false, true})
        for (const Index gap : {0, 3, 8}) {  // bf16 rows that 16 bytes divide, or not
          const auto x = random_tensor(mode, tokens, features), w = random_tensor(mode, outputs, features, 0.3f), b = random_tensor(mode, 1, outputs);
          const OnDevice in(x, mode.type, features + gap), weight(w, mode.type), bias(b, mode.type), out(tokens, outputs + 5, mode.type);
          gpu::linear(stream(), in.view(), weight.view(), biased ? bias.view() : gpu::View{}, out.view().column_range(5, outputs));
          Tensor expected(tokens, outputs), mine(tokens, outputs);
          lm::cpu::linear(mode.on(), lm::cpu::Packed(mode.on(), x), weight_of(w, mode.type), biased ? weight_of(b, mode.type) : lm::Weight{},
                          expected);
          const auto all = out.get();
          for (Index r = 0; r < tokens; ++r) {
            std::copy(all.row(r) + 5, all.row(r) + 5 + outputs, mine.row(r));
            for (Index c = 0; c < 5; ++c) CHECK(std::isnan(all.row(r)[c]));
          }
          CHECK(worst(mine, expected) <= bound(mode, 2e-6));
        }
}

TEST_CASE("bf16 operands give f32 logits of a router, widened") {
  const auto& mode = kModes[1];
  const auto x = random_tensor(mode, 7, 65), w = random_tensor(mode, 9, 65);
  const OnDevice in(x, mode.type), weight(w, mode.type), out(7, 9, shard::DType::F32);
  gpu::linear(stream(), in.view(), weight.view(), {}, out.view());
  Tensor expected(7, 9);
  for (Index r = 0; r < 7; ++r)
    for (Index e = 0; e < 9; ++e) {
      double sum = 0;
      for (Index c = 0; c < 65; ++c) sum += static_cast<double>(x.row(r)[c]) * static_cast<double>(w.row(e)[c]);
      expected.row(r)[e] = static_cast<float>(sum);
    }
  CHECK(worst(out.get(), expected) <= 1e-6);
}

TEST_CASE("weights stored in f16 and fp8 are widened") {
  for (const auto type : {shard::DType::F16, shard::DType::F8E4M3, shard::DType::F8E5M2}) {
    const auto x = random_tensor(kModes[0], 7, 40), w = random_tensor(kModes[0], 9, 40);
    const OnDevice in(x, shard::DType::F32), weight(w, type), out(7, 9, shard::DType::F32);
    gpu::linear(stream(), in.view(), weight.view(), {}, out.view());
    Tensor expected(7, 9);
    const lm::cpu::Context on;
    lm::cpu::linear(on, lm::cpu::Packed(on, x), weight_of(weight.get(), shard::DType::F32), {}, expected);
    CHECK(worst(out.get(), expected) <= 2e-6);
  }
}

TEST_CASE("weights of another width are refused") {
  const OnDevice x(2, 8, shard::DType::F32), w(4, 9, shard::DType::F32), v(4, 8, shard::DType::I32), out(2, 4, shard::DType::F32);
  CHECK_THROWS_AS(gpu::linear(stream(), x.view(), w.view(), {}, out.view()), shard::Error);
  CHECK_THROWS_AS(gpu::linear(stream(), x.view(), v.view(), {}, out.view()), shard::Error);
}
