// The language module on a device against the host: choices, memory, recorded steps.
#include "gpu/model/device_ops.h"
#include "gpu/model/load_weights.h"
#include "gpu/model/memory_plan.h"
#include "gpu/ops/rows.h"
#include "libshard/error.h"
#include "tests/gpu/model.h"

#include <array>

using namespace lm;
using namespace models;

TEST_CASE("an attention backend is chosen by what it can do") {
  AttentionShape shape{1, 4, 2, 1, 0, 64, 64, 1.0};
  using enum AttentionBackend;
  CHECK(gpu::choose_attention(Auto, shape) == Flash);
  shape.key_size = 320;
  CHECK(gpu::choose_attention(Auto, shape) == Local);
  CHECK_THROWS_WITH_AS(gpu::choose_attention(Flash, shape), doctest::Contains("at most 256"), shard::Error);
  shape.value_size = 640;
  CHECK(gpu::choose_attention(Auto, shape) == Unfused);
  CHECK_THROWS_AS(gpu::choose_attention(Local, shape), shard::Error);
  CHECK(gpu::choose_attention(Unfused, shape) == Unfused);
}

TEST_CASE("activations stay within what the memory plan says") {
  for (const auto* name : {"hf/gpt2_tied_f32", "hf/gemma2_tied_bf16", "hf/deepseek_v3_mtp_bf16", "hf/qwen3_moe_bf16"})
    for (const auto compute : {Compute::F32, Compute::Bf16, Compute::Fp8}) {
      CAPTURE(std::string(name));
      const Model model(name);
      const formats::LocalReader reader(model.checkpoint.logical, model.checkpoint.files);
      WeightSource source(reader, formats::kernels(), compute);
      gpu::DeviceOps ops({.device = 0, .compute = compute});
      Group alone(1);
      LocalComm comm(alone, 0);
      LanguageModule module(model.config, source, placement_of(model.config, 0, 1), comm, comm, ops);
      auto uses = module.weight_uses(0, true);
      for (const auto& table : module.gathered_weights())
        if (std::none_of(uses.begin(), uses.end(), [&](const auto& use) { return use.name == table; })) uses.push_back({table});
      for (auto& use : uses) use.times = 1;
      WeightStream stream(source, uses, 64 << 20, nullptr);
      gpu::Resident held;
      const StagePlan plan{uses, {}, {parts_of(model.config, source, uses, {})}, {}};
      held.hold(plan.parts[0], ops.stream());
      gpu::load_weights(stream, plan, 0, held, nullptr, ops.stream());
      gpu::RankWeights weights(held, ops);
      ForwardResult result;
      std::mutex mutex;
      module.forward(weights, {model.batch, model.steps, 200, 200, {}, true}, result, mutex);
      CHECK(result.main.all.size() == 38);
      CHECK(ops.held() > 0);
      CHECK(ops.held() <= gpu::activation_bytes(model.config, {1, 1, compute, 1}, 38));
    }
}

TEST_CASE("a device that is too small is refused with what is missing and what would fit") {
  const gpu::Demand demand{100'000'000, 50'000'000, 1'000'000, 2'000'000};
  gpu::require_fits(demand, 151'000'000, "cuda:0", {});
  CHECK_THROWS_WITH_AS(gpu::require_fits(demand, 150'000'000, "cuda:0", {}), doctest::Contains("fewer tokens"), shard::Error);
  CHECK_THROWS_WITH_AS(gpu::require_fits(demand, 80'000'000, "cuda:0", {}), doctest::Contains("--compute bf16"), shard::Error);
  CHECK_THROWS_WITH_AS(gpu::require_fits(demand, 80'000'000, "cuda:0", {1, 1, Compute::Bf16, 1}), doctest::Contains("--pp"), shard::Error);
}

TEST_CASE("steps are recorded the second time, replayed the third, and follow weights that are swapped in place") {
  Model model("pairs/deepseek_v3_mtp_bf16/tp1pp2");
  for (int i = 0; i < 4; ++i) model.add_step(5);
  model.add_step(3);  // another shape has a recording of its own
  const auto host = model.on_host({.threads = 1});
  const auto device = gpu::language_device({.devices = {0}}), plain = gpu::language_device({.devices = {0}, .graphs = false});
  const auto first = model.run(*device, {.threads = 1}), again = model.run(*device, {.threads = 1}), eager = model.run(*plain, {.threads = 1});
  REQUIRE(first.result.step_hidden.size() == 5);
  for (std::size_t s = 0; s < 5; ++s) {
    CHECK(same_bits(first.result.step_hidden[s], eager.result.step_hidden[s]));
    CHECK(same_bits(again.result.step_hidden[s], eager.result.step_hidden[s]));
    CHECK(furthest({host.result.step_hidden[s].values().begin(), host.result.step_hidden[s].values().end()},
                   {first.result.step_hidden[s].values().begin(), first.result.step_hidden[s].values().end()}) < 1e-4);
  }
}

TEST_CASE("steps under way together take their own inputs, though the caller writes over its memory, and results that are held stay") {
  for (const bool graphs : {true, false}) {
    gpu::DeviceOps ops({.graphs = graphs});
    Tensor table(10, 8), hidden(2, 8);
    for (Index r = 0; r < 10; ++r) std::fill(table.row(r), table.row(r) + 8, static_cast<float>(r));
    const auto rows = ops.to_device(table);
    const auto pick = [&](const Ids& ids) {
      auto out = ops.make(2, 8);
      gpu::gather(ops.stream(), gpu::view_of(out), gpu::view_of(rows), 0, gpu::on_device(ids));
      return out;
    };
    const auto step = [&](const Tensor& x, const Ids& ids, const Ids& positions) {  // 100·id + 10·position + x
      auto out = pick(ids);
      ops.scale(out, 10);
      ops.add(out, pick(positions));
      ops.scale(out, 10);
      ops.add(out, x);
      return out;
    };
    std::vector<Tensor> held;
    for (Index i = 0; i < 12; ++i) {
      std::fill(hidden.values().begin(), hidden.values().end(), static_cast<float>(i) / 16);
      const std::vector<Index> ids{i % 9, i % 9 + 1}, positions{i % 5, i % 3};
      auto out = ops.recorded("step", hidden, ids, positions, step);
      if (i % 4 != 3) held.push_back(std::move(out));  // the fourth of each is dropped, where it may lie in another's place
      if (i == 6) held.clear();
      std::fill(hidden.values().begin(), hidden.values().end(), std::nanf(""));
    }
    for (std::size_t n = 0; n < held.size(); ++n) {
      const Index i = std::array{8, 9, 10}[n];
      const auto out = ops.to_host(held[n]);
      for (Index r = 0; r < 2; ++r)
        for (Index c = 0; c < 8; ++c) CHECK(out.row(r)[c] == 100.0f * static_cast<float>(i % 9 + r) + 10.0f * static_cast<float>(r ? i % 3 : i % 5) + static_cast<float>(i) / 16);
    }
    CHECK(held.size() == 3);
  }
}

TEST_CASE("recorded steps do not outlive the configuration that they were recorded under") {
  Model model("pairs/deepseek_v3_mtp_bf16/tp1pp2");
  for (int i = 0; i < 3; ++i) model.add_step(5);
  const auto device = gpu::language_device({.devices = {0}});
  const auto before = model.run(*device, {.threads = 1});
  model.config.layernorm_epsilon = 1;  // the same weights in the same places
  model.config.rope.base = 17;
  const auto after = model.run(*device, {.threads = 1}), fresh = model.run(*gpu::language_device({.devices = {0}}), {.threads = 1});
  for (std::size_t s = 0; s < 3; ++s) {
    CHECK(!same_bits(after.result.step_hidden[s], before.result.step_hidden[s]));
    CHECK(same_bits(after.result.step_hidden[s], fresh.result.step_hidden[s]));
  }
}
