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

TEST_CASE("linears of few rows are the CPU's within one rounding, several at once, and the same each time") {
  const auto& mode = kModes[1];
  for (const Index tokens : {1, 2, 3, 7, 8, 9, 15, 16})
    for (const Index features : {8, 40, 256, 264, 2080})  // less than a warp's step; with an odd end; more than two turns
      for (const auto type : {shard::DType::BF16, shard::DType::F32}) {
        CAPTURE(tokens);
        CAPTURE(features);
        const auto x = random_tensor(mode, tokens, features);
        const OnDevice in(x, mode.type, features + 8);
        struct One {
          Tensor w, b;
          OnDevice weight, bias, out;
          bool biased;
          One(const Tensor& like, Index outputs, Index columns, shard::DType type, bool with)
              : w(random_tensor(kModes[1], outputs, columns, 0.3f)), b(random_tensor(kModes[1], 1, outputs)), weight(w, kModes[1].type, columns + 16),
                bias(b, outputs % 2 ? shard::DType::F32 : shard::DType::BF16), out(like.rows(), outputs + 5, type), biased(with) {}
          gpu::LinearViews views() const {
            return {weight.view(), biased ? bias.view() : gpu::View{}, out.view().column_range(5, weight.view().rows)};
          }
        };
        std::vector<One> all;
        for (const Index outputs : {70, 1, 16, 33, 17}) all.emplace_back(x, outputs, features, type, outputs != 16);  // more than one launch
        std::vector<gpu::LinearViews> views;
        for (const auto& one : all) views.push_back(one.views());
        gpu::thin_linears(stream(), in.view(), views);
        for (const auto& one : all) {
          const auto outputs = one.w.rows();
          Tensor expected(tokens, outputs), mine(tokens, outputs);
          lm::cpu::linear(type == shard::DType::F32 ? kModes[0].on() : mode.on(), lm::cpu::Packed(kModes[type != shard::DType::F32].on(), x), weight_of(one.w, mode.type),
                          one.biased ? weight_of(one.b, mode.type) : lm::Weight{}, expected);
          const auto found = one.out.get();
          for (Index r = 0; r < tokens; ++r) {
            std::copy(found.row(r) + 5, found.row(r) + 5 + outputs, mine.row(r));
            for (Index c = 0; c < 5; ++c) CHECK(std::isnan(found.row(r)[c]));
          }
          CHECK(worst(mine, expected) <= (type == shard::DType::F32 ? 4e-6 : bound(mode, 0)));
        }
        const auto first = all[0].out.get();
        gpu::thin_linears(stream(), in.view(), {views.data(), 1});  // alone as among others
        CHECK(std::memcmp(all[0].out.get().row(0), first.row(0), first.values().size_bytes()) == 0);
      }
}

TEST_CASE("linears that no thin launch takes are refused") {
  const OnDevice x(17, 8, shard::DType::BF16), odd(2, 9, shard::DType::BF16), w(4, 8, shard::DType::BF16), odd_w(4, 9, shard::DType::BF16), wide(4, 8, shard::DType::F32),
      out(17, 4, shard::DType::BF16), few(2, 4, shard::DType::BF16);
  const auto run = [](const OnDevice& x, const OnDevice& w, const OnDevice& out) {
    const gpu::LinearViews one{w.view(), {}, out.view()};
    gpu::thin_linears(stream(), x.view(), {&one, 1});
  };
  CHECK_THROWS_AS(run(x, w, out), shard::Error);
  CHECK_THROWS_AS(run(odd, odd_w, few), shard::Error);
  const OnDevice two(2, 8, shard::DType::BF16);
  CHECK_THROWS_AS(run(two, wide, few), shard::Error);
  CHECK_THROWS_AS(run(two, w, out), shard::Error);
  run(two, w, few);
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
