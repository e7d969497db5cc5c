// Routing and the experts' order of rows against the CPU's.
#include "gpu/ops/linear.h"
#include "gpu/ops/route.h"
#include "gpu/ops/rows.h"
#include "gpu/ops/elementwise.h"

#include "libshard/error.h"
#include "tests/gpu/cpu_meaning.h"

using namespace meaning;

namespace {

struct Case {
  const char* name;
  shard::RouterConfig config;
  Index experts;
  bool bias = false, ties = false;
};

std::vector<Case> cases() {
  using Score = shard::RouterConfig::Score;
  using Rule = shard::RouterConfig::GroupRule;
  std::vector<Case> out;
  const auto add = [&](const char* name, Index experts, bool bias, auto&& set) {
    Case one{name, {}, experts, bias, false};
    set(one.config);
    out.push_back(one);
    one.ties = true;
    out.push_back(one);
  };
  add("mixtral", 8, false, [](auto& c) { c.topk = 2; });
  add("qwen", 60, false, [](auto& c) { c.topk = 4, c.pre_softmax = c.renormalize = true; });
  add("plain probabilities", 33, false, [](auto& c) { c.topk = 1, c.pre_softmax = true, c.scaling = 2.5; });
  add("deepseek 2", 40, false, [](auto& c) { c.topk = 6, c.pre_softmax = true, c.num_groups = 8, c.group_topk = 3, c.group_rule = Rule::Max; });
  add("deepseek 3", 64, true, [](auto& c) {
    c.score = Score::Sigmoid, c.topk = 8, c.renormalize = true, c.num_groups = 8, c.group_topk = 4, c.group_best = 2, c.scaling = 2.5, c.fp32 = true;
  });
  add("softplus", 16, true, [](auto& c) { c.score = Score::SqrtSoftplus, c.topk = 3, c.renormalize = true; });
  add("groups of one kept", 12, false, [](auto& c) { c.topk = 6, c.num_groups = 4, c.group_topk = 1, c.group_best = 2; });  // more than a group holds
  return out;
}

}  // namespace

TEST_CASE("tokens go to the CPU's experts, ties included, with weights within 1e-6 or one rounding of bf16") {
  for (const auto& mode : kModes)
    for (const auto& one : cases()) {
      CAPTURE(one.name);
      CAPTURE(one.ties);
      CAPTURE(mode.bf16());
      auto logits = random_tensor(mode, 33, one.experts, 2);
      if (one.ties)
        for (auto& value : logits.values()) value = std::round(value);  // a handful of values, +0 and −0 among them
      const auto bias = random_tensor(kModes[0], 1, one.experts, 0.1f);
      auto zero = Tensor(1, one.experts);
      for (auto& value : zero.values()) value = 0;
      const auto& added = one.ties ? zero : bias;
      const OnDevice x(logits, mode.type), b(added, shard::DType::F32);
      const auto count = static_cast<std::size_t>(33 * one.config.topk);
      const Values<std::int32_t> expert(count);
      const Values<float> weight(count);
      gpu::route(stream(), one.config, x.view(), one.bias ? b.view() : gpu::View{}, mode.bf16() && !one.config.fp32, expert.data(), weight.data());
      const auto expected = lm::cpu::route(mode.on(), one.config, logits, one.bias ? weight_of(added, shard::DType::F32) : lm::Weight{});
      const auto chosen = expert.get();
      const auto weights = weight.get();
      for (std::size_t i = 0; i < count; ++i) {
        CAPTURE(i);
        CHECK(chosen[i] == expected.expert[i]);
        CHECK(std::abs(weights[i] - expected.weight[i]) <= bound(mode, 1e-6) * std::max(1.0f, std::abs(expected.weight[i])));
      }
    }
}

TEST_CASE("logits that are no numbers still choose experts") {
  Tensor logits(3, 5);
  for (auto& value : logits.values()) value = NAN;
  logits.row(1)[2] = 1;
  const OnDevice x(logits, shard::DType::F32);
  const Values<std::int32_t> expert(6);
  const Values<float> weight(6);
  gpu::route(stream(), {}, x.view(), {}, false, expert.data(), weight.data());
  for (const auto e : expert.get()) CHECK((e >= 0 && e < 5));
}

TEST_CASE("a router that is too wide is refused") {
  const OnDevice wide(1, 1025, shard::DType::F32), few(1, 2, shard::DType::F32);
  shard::RouterConfig config;
  CHECK_THROWS_AS(gpu::route(stream(), config, wide.view(), {}, false, nullptr, nullptr), shard::Error);
  config.topk = 3;
  CHECK_THROWS_AS(gpu::route(stream(), config, few.view(), {}, false, nullptr, nullptr), shard::Error);
}

TEST_CASE("experts' rows are their tokens in order, over several slices of tokens") {
  for (const Index tokens : {2500, 2049}) {
    const Index topk = 3, experts = 7, rows = tokens * topk;
    std::vector<std::int32_t> expert;
    std::vector<float> weight;
    for (Index t = 0; t < tokens; ++t) {
      const auto first = static_cast<std::int32_t>(t < 2000 ? random_below(3) : random_below(experts));
      for (std::int32_t k = 0; k < topk; ++k) expert.push_back((first + 2 * k) % experts), weight.push_back(random_value());
    }
    const Values<std::int32_t> chosen(expert), offsets(8), tiles(8), token(static_cast<std::size_t>(rows)), row(static_cast<std::size_t>(rows));
    const Values<float> weights(weight), row_weight(static_cast<std::size_t>(rows));
    gpu::permute(stream(), tokens, topk, experts, chosen.data(), weights.data(),
                 {offsets.data(), tiles.data(), token.data(), row_weight.data(), row.data()});
    std::vector<std::int32_t> starts{0}, runs{0}, order, places(expert.size());
    std::vector<float> order_weight;
    for (std::int32_t e = 0; e < experts; ++e) {
      for (std::size_t i = 0; i < expert.size(); ++i)
        if (expert[i] == e) {
          places[i] = static_cast<std::int32_t>(order.size());
          order.push_back(static_cast<std::int32_t>(i) / static_cast<std::int32_t>(topk));
          order_weight.push_back(weight[i]);
        }
      runs.push_back(runs.back() + (static_cast<std::int32_t>(order.size()) - starts.back() + 63) / 64);
      starts.push_back(static_cast<std::int32_t>(order.size()));
    }
    CHECK(offsets.get() == starts);
    CHECK(tiles.get() == runs);
    CHECK(token.get() == order);
    CHECK(row.get() == places);
    CHECK(row_weight.get() == order_weight);
  }
}

TEST_CASE("a mixture of experts, weighed behind or before, is what the CPU's loop over experts makes") {
  for (const auto& mode : kModes)
    for (const Index tokens : {1, 7, 150})
      for (const bool on_input : {false, true}) {
        CAPTURE(mode.bf16());
        CAPTURE(tokens);
        CAPTURE(on_input);
        const Index experts = 5, topk = 2, hidden = 40, wide = tokens == 7 ? 36 : 72, rows = tokens * topk;  // 36: rows that start at no 16 bytes
        const auto x = random_tensor(mode, tokens, hidden);
        std::vector<std::int32_t> expert;
        std::vector<float> weight;
        for (Index t = 0; t < tokens; ++t) {  // expert 3 has none
          const auto a = random_below(3);
          expert.push_back(static_cast<std::int32_t>(a == 0 ? 4 : a));
          expert.push_back(static_cast<std::int32_t>(a == 2 ? 1 : 0));
          weight.push_back(std::abs(random_value()));
          weight.push_back(std::abs(random_value()));
        }
        std::vector<Tensor> up, down, bias;
        std::vector<OnDevice> memory;
        std::vector<const std::byte*> up_data, down_data, bias_data;
        for (Index e = 0; e < experts; ++e) {
          up.push_back(random_tensor(mode, wide, hidden, 0.2f));
          down.push_back(random_tensor(mode, hidden, wide, 0.2f));
          bias.push_back(random_tensor(mode, 1, hidden));
          for (const auto* part : {&up, &down, &bias}) memory.emplace_back(part->back(), mode.type);
          up_data.push_back(memory[memory.size() - 3].view().data);
          down_data.push_back(memory[memory.size() - 2].view().data);
          bias_data.push_back(memory[memory.size() - 1].view().data);
        }
        const Values<const std::byte*> ups(up_data), downs(down_data), biases(bias_data);
        const Values<std::int32_t> offsets(6), tiles(6), token(static_cast<std::size_t>(rows)), row(static_cast<std::size_t>(rows));
        const Values<float> weights(weight), row_weight(static_cast<std::size_t>(rows));
        const gpu::Permutation order{offsets.data(), tiles.data(), token.data(), row_weight.data(), row.data()};
        // Recorded while other experts were chosen: nothing of the choice is read on the host.
        const Values<std::int32_t> chosen(std::vector<std::int32_t>(expert.rbegin(), expert.rend()));
        const OnDevice in(x, mode.type), gathered(rows, hidden, mode.type), middle(rows, wide, mode.type), part(rows, hidden, mode.type),
            out(tokens, hidden, mode.type);
        shard::TransformerConfig config;
        gpu::Graph::begin(stream());
        gpu::permute(stream(), tokens, topk, experts, chosen.data(), weights.data(), order);
        gpu::gather_rows(stream(), gathered.view(), in.view(), token.data(), on_input ? row_weight.data() : nullptr);
        gpu::grouped_linear(stream(), gathered.view(), {ups.data(), nullptr, mode.type, wide, hidden, hidden}, experts, offsets.data(), tiles.data(),
                            nullptr, middle.view());
        if (on_input) gpu::fill(stream(), {reinterpret_cast<std::byte*>(row_weight.data()), shard::DType::F32, 1, rows, rows}, 1);
        gpu::activate(stream(), gpu::activation_config(config), {}, middle.view());
        gpu::scale_rows(stream(), middle.view(), row_weight.data());
        gpu::grouped_linear(stream(), middle.view(), {downs.data(), biases.data(), mode.type, hidden, wide, wide}, experts, offsets.data(),
                            tiles.data(), row_weight.data(), part.view());
        gpu::combine(stream(), out.view(), part.view(), topk, row.data());
        const auto graph = gpu::Graph::end(stream());
        graph.launch(stream());
        gpu::to_device(reinterpret_cast<std::byte*>(chosen.data()), expert.data(), expert.size() * sizeof(expert[0]), stream());
        graph.launch(stream());
        stream().wait();

        std::vector<std::int32_t> order_of_tokens, starts{0};
        for (std::int32_t e = 0; e < experts; ++e) {
          for (std::size_t i = 0; i < expert.size(); ++i)
            if (expert[i] == e) order_of_tokens.push_back(static_cast<std::int32_t>(i) / topk);
          starts.push_back(static_cast<std::int32_t>(order_of_tokens.size()));
        }
        config.num_experts = experts, config.hidden_size = hidden, config.moe_probs_on_input = on_input;
        const auto expected = lm::cpu::experts(mode.on(), config, x, {topk, {expert.begin(), expert.end()}, weight}, [&](Index e) {
          const auto at = static_cast<std::size_t>(e);
          return lm::FeedForward{{}, {weight_of(up[at], mode.type), {}}, {weight_of(down[at], mode.type), weight_of(bias[at], mode.type)}};
        });
        CHECK(offsets.get() == starts);
        CHECK(token.get() == order_of_tokens);
        CHECK(worst(out.get(), expected) <= (mode.bf16() ? 0.02 : 3e-6));  // bf16: roundings of four steps may each fall to the other side
      }
}
