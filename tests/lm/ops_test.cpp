// Every op against the plainest loops that mean the same.
#include "lm/cpu/ops.h"

#include "lm/cpu/cross_entropy.h"
#include "lm/cpu/kernel.h"
#include "lm/cpu/workers.h"
#include "libshard/error.h"

#include <doctest/doctest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>

using namespace lm;
using namespace lm::cpu;

namespace {

Tensor random_tensor(Index rows, Index columns, std::mt19937& random, float spread = 1) {
  std::normal_distribution<float> normal(0, spread);
  Tensor out(rows, columns);
  for (auto& value : out.values()) value = normal(random);
  return out;
}

/// A weight that views a tensor's numbers; the tensor must outlive it.
Weight view(const Tensor& t) {
  return {{}, reinterpret_cast<const std::byte*>(t.row(0)), shard::DType::F32, t.rows(), t.columns(), t.columns()};
}

Weight as_bf16(const Tensor& t, std::vector<std::uint16_t>& storage) {
  for (const auto value : t.values()) storage.push_back(static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(value) >> 16));
  return {{}, reinterpret_cast<const std::byte*>(storage.data()), shard::DType::BF16, t.rows(), t.columns(), t.columns()};
}

bool same_bits(const Tensor& a, const Tensor& b) {
  return a.values().size() == b.values().size() && std::memcmp(a.row(0), b.row(0), a.values().size_bytes()) == 0;
}

}  // namespace

TEST_CASE("linear is the sum of products, for odd sizes, both weight types and any number of threads") {
  std::mt19937 random(1);
  for (const auto [tokens, in, out] : {std::array<Index, 3>{1, 1, 1}, {5, 7, 3}, {32, 64, 48}, {33, 257, 49}, {515, 96, 13}, {50, 1100, 75}}) {
    const auto x = random_tensor(tokens, in, random), w = random_tensor(out, in, random), bias = random_tensor(1, out, random);
    std::vector<std::uint16_t> storage;
    for (const auto& weight : {view(w), as_bf16(w, storage)}) {
      Tensor one(tokens, out), two(tokens, out);
      linear({Compute::F32, 1}, cpu::Packed({Compute::F32, 1}, x), weight, view(bias), one);
      linear({Compute::F32, 3}, cpu::Packed({Compute::F32, 3}, x), weight, view(bias), two);
      CHECK(same_bits(one, two));
      for (Index t = 0; t < tokens; ++t)
        for (Index n = 0; n < out; ++n) {
          double sum = bias.row(0)[n];
          for (Index k = 0; k < in; ++k) sum += static_cast<double>(x.row(t)[k]) * static_cast<double>(weight.at(n, k));
          REQUIRE(one.row(t)[n] == doctest::Approx(sum).epsilon(1e-4));
        }
    }
  }
}

TEST_CASE("a linear's rows and columns do not depend on what else is computed with them") {
  std::mt19937 random(2);
  const auto x = random_tensor(40, 300, random), w = random_tensor(100, 300, random);
  const Context on{Compute::F32, 2};
  Tensor whole(40, 100), part(40, 17);
  linear(on, cpu::Packed(on, x), view(w), {}, whole);
  linear(on, cpu::Packed(on, x), view(w).row_range(61, 17), {}, part);
  for (Index t = 0; t < 40; ++t)
    for (Index n = 0; n < 17; ++n) REQUIRE(part.row(t)[n] == whole.row(t)[61 + n]);
}

TEST_CASE("the flag ends an op between two tasks") {
  std::mt19937 random(9);
  const auto x = random_tensor(600, 32, random), w = random_tensor(600, 32, random);
  for (const unsigned threads : {1u, 3u}) {
    std::atomic<bool> stop = false;
    std::atomic<int> started = 0;
    const auto tasks = [&] {
      cpu::run_on_workers(100, threads, [&](std::size_t) { if (++started == 5) stop = true; }, &stop);
    };
    CHECK_THROWS_AS(tasks(), shard::Error);
    CHECK(started < 5 + static_cast<int>(threads));
    stop = true;
    const Context on{Compute::F32, threads, &stop}, unstopped{Compute::F32, threads};
    const AttentionShape shape{.batch = 1, .length = 600, .heads = 2, .ratio = 1, .key_size = 16, .value_size = 16, .scale = 1};
    CHECK_THROWS_AS(attention(on, shape, x, x, x, {}), shard::Error);
    Tensor out(600, 600);
    CHECK_THROWS_AS(linear(on, cpu::Packed(unstopped, x), view(w), {}, out), shard::Error);
  }
}

TEST_CASE("linear in bf16 rounds its result once") {
  std::mt19937 random(3);
  const Context on{Compute::Bf16, 2};
  for (const auto [tokens, in, rows] : {std::array<Index, 3>{9, 65, 30}, {50, 2051, 75}}) {
    auto x = random_tensor(tokens, in, random);
    round_values(on, x.values());
    const auto w = random_tensor(rows, in, random);
    std::vector<std::uint16_t> storage;
    const auto weight = as_bf16(w, storage);
    Tensor out(tokens, rows);
    linear(on, cpu::Packed(on, x), weight, {}, out);
    for (Index t = 0; t < tokens; ++t)
      for (Index n = 0; n < rows; ++n) {
        double sum = 0;
        for (Index k = 0; k < in; ++k) sum += static_cast<double>(x.row(t)[k]) * static_cast<double>(weight.at(n, k));
        CHECK((std::bit_cast<std::uint32_t>(out.row(t)[n]) & 0xffff) == 0);
        CHECK(std::abs(static_cast<double>(out.row(t)[n]) - sum) <= std::abs(sum) * 0.004 + 1e-4);
      }
  }
}

TEST_CASE("every instruction set's product is the same sum") {
  std::mt19937 random(8);
  for (const auto& kernel : cpu::usable_products()) {
    for (const auto [rows, k, columns] : {std::array<Index, 3>{1, 1, 16}, {13, 37, 32}, {50, 64, 48}}) {
      const auto a = random_tensor(rows, k, random), b = random_tensor(k, columns, random);
      auto c = random_tensor(rows, columns, random);
      const auto before = c.clone();
      kernel.f32(a.row(0), k, b.row(0), columns, c.row(0), columns, rows, columns, k, true);
      for (Index r = 0; r < rows; ++r)
        for (Index j = 0; j < columns; ++j) {
          double sum = before.row(r)[j];
          for (Index i = 0; i < k; ++i) sum += static_cast<double>(a.row(r)[i]) * static_cast<double>(b.row(i)[j]);
          REQUIRE(c.row(r)[j] == doctest::Approx(sum).epsilon(1e-4));
        }
    }
  }
}

TEST_CASE("norms") {
  std::mt19937 random(4);
  const auto x = random_tensor(6, 50, random, 3), w = random_tensor(1, 50, random), b = random_tensor(1, 50, random);
  for (const bool centred : {false, true})
    for (const auto kind : {shard::Normalization::RMSNorm, shard::Normalization::LayerNorm}) {
      const auto y = normalize({Compute::F32, 2}, x, kind, 1e-5, centred, view(w), view(b));
      for (Index r = 0; r < 6; ++r) {
        double mean = 0, square = 0;
        if (kind == shard::Normalization::LayerNorm)
          for (Index i = 0; i < 50; ++i) mean += static_cast<double>(x.row(r)[i]) / 50;
        for (Index i = 0; i < 50; ++i) square += (static_cast<double>(x.row(r)[i]) - mean) * (static_cast<double>(x.row(r)[i]) - mean) / 50;
        for (Index i = 0; i < 50; ++i) {
          const auto scale = static_cast<double>(w.row(0)[i]) + (centred ? 1 : 0);
          REQUIRE(y.row(r)[i] == doctest::Approx((static_cast<double>(x.row(r)[i]) - mean) / std::sqrt(square + 1e-5) * scale + static_cast<double>(b.row(0)[i])).epsilon(1e-5));
        }
      }
    }
}

TEST_CASE("attention: groups, windows, soft caps, sinks and off-by-one") {
  std::mt19937 random(5);
  struct Variant {
    Index length, heads, ratio, first, keys, values, window;
    double cap;
    bool sinks, off_by_one;
  };
  for (const auto& v : {Variant{1, 1, 1, 0, 4, 4, 0, 0, false, false}, {50, 4, 2, 0, 8, 8, 0, 0, false, false}, {70, 4, 4, 0, 12, 5, 9, 0, false, false},
                        {130, 3, 2, 1, 16, 16, 40, 2.5, true, false}, {33, 2, 1, 0, 6, 10, 1, 0, false, true}}) {
    const auto key_heads = (v.first + v.heads - 1) / v.ratio + 1;
    const Index batch = 2;
    const auto q = random_tensor(batch * v.length, v.heads * v.keys, random), k = random_tensor(batch * v.length, key_heads * v.keys, random),
               values = random_tensor(batch * v.length, key_heads * v.values, random), sink = random_tensor(1, v.heads, random);
    const AttentionShape shape{batch, v.length, v.heads, v.ratio, v.first, v.keys, v.values, 0.3, v.cap, v.window, v.off_by_one};
    const auto found = attention({Compute::F32, 2}, shape, q, k, values, v.sinks ? view(sink) : Weight{});
    for (Index b = 0; b < batch; ++b)
      for (Index h = 0; h < v.heads; ++h)
        for (Index i = 0; i < v.length; ++i) {
          std::vector<double> weight(static_cast<std::size_t>(v.length), 0.0), out(static_cast<std::size_t>(v.values), 0.0);
          double sum = v.sinks ? std::exp(static_cast<double>(sink.row(0)[h])) : v.off_by_one ? 1 : 0;
          const auto group = (v.first + h) / v.ratio;
          for (Index j = 0; j <= i; ++j) {
            if (v.window && i - j >= v.window) continue;
            double score = 0;
            for (Index d = 0; d < v.keys; ++d) score += static_cast<double>(q.row(b * v.length + i)[h * v.keys + d]) * static_cast<double>(k.row(b * v.length + j)[group * v.keys + d]);
            score *= 0.3;
            if (v.cap > 0) score = v.cap * std::tanh(score / v.cap);
            sum += weight[static_cast<std::size_t>(j)] = std::exp(score);
          }
          for (Index j = 0; j <= i; ++j)
            for (Index d = 0; d < v.values; ++d) out[static_cast<std::size_t>(d)] += weight[static_cast<std::size_t>(j)] / sum * static_cast<double>(values.row(b * v.length + j)[group * v.values + d]);
          for (Index d = 0; d < v.values; ++d) REQUIRE(std::abs(static_cast<double>(found.row(b * v.length + i)[h * v.values + d]) - out[static_cast<std::size_t>(d)]) < 2e-5);
        }
  }
}

TEST_CASE("gated and plain activations, clamps and the linear offset") {
  shard::TransformerConfig config;
  const Context on{Compute::F32, 1};
  const auto one = [&](float gate, float up) {
    Tensor g(1, 1), u(1, 1);
    g.row(0)[0] = gate;
    u.row(0)[0] = up;
    activate(on, config, config.gated_linear_unit ? &g : nullptr, u);
    return static_cast<double>(u.row(0)[0]);
  };
  CHECK(one(1.5f, 2) == doctest::Approx(1.5 / (1 + std::exp(-1.5)) * 2));
  CHECK(one(-100, 2) == doctest::Approx(0));
  config.activation = shard::Activation::QuickGelu;
  config.glu_linear_offset = 1;
  config.activation_clamp = 7;
  CHECK(one(9, -20) == doctest::Approx(7 / (1 + std::exp(-1.702 * 7)) * -6));
  CHECK(one(-9, 20) == doctest::Approx(-9 / (1 + std::exp(1.702 * 9)) * 8));
  config = {};
  config.gated_linear_unit = false;
  config.activation = shard::Activation::GeluErf;
  CHECK(one(0, 1) == doctest::Approx(0.8413447461));
  config.activation = shard::Activation::GeluTanh;
  CHECK(one(0, 1) == doctest::Approx(0.8411919906));
  config.activation = shard::Activation::SquaredRelu;
  CHECK(one(0, -3) == 0);
  CHECK(one(0, 3) == 9);
}

TEST_CASE("routers: which experts, and with what weight") {
  const Context on{Compute::F32, 1};
  Tensor logits(1, 4), bias(1, 4);
  const float scores[] = {1, 3, 2, -1}, biases[] = {5, 0, 0, 0};
  std::copy(scores, scores + 4, logits.row(0));
  std::copy(biases, biases + 4, bias.row(0));
  shard::RouterConfig config;
  config.topk = 2;
  auto found = route(on, config, logits, {});
  CHECK(found.expert == std::vector<Index>{1, 2});
  CHECK(static_cast<double>(found.weight[0]) == doctest::Approx(1 / (1 + std::exp(-1.0))));
  config.pre_softmax = true;
  const auto before = route(on, config, logits, {}).weight[0];
  CHECK(static_cast<double>(before) == doctest::Approx(std::exp(3.0) / (std::exp(1.0) + std::exp(3.0) + std::exp(2.0) + std::exp(-1.0))));
  config.renormalize = true;
  CHECK(static_cast<double>(route(on, config, logits, {}).weight[0]) == doctest::Approx(static_cast<double>(found.weight[0])));
  config.score = shard::RouterConfig::Score::Sigmoid;
  config.scaling = 2.5;
  found = route(on, config, logits, view(bias));  // the bias chooses, and is no part of the weight
  CHECK(found.expert == std::vector<Index>{0, 1});
  const auto a = 1 / (1 + std::exp(-1.0)), b = 1 / (1 + std::exp(-3.0));
  CHECK(static_cast<double>(found.weight[0]) == doctest::Approx(2.5 * a / (a + b)));
  config.num_groups = 2;
  config.group_topk = 1;
  config.group_best = 2;
  CHECK(route(on, config, logits, {}).expert == std::vector<Index>{1, 0});  // the group of 1 and 3, not of 2 and −1
}

TEST_CASE("cross entropy: blocks, limits, ranks and labels that are no tokens") {
  std::mt19937 random(6);
  const auto logits = random_tensor(11, 60, random, 4);
  std::vector<Index> labels;
  for (Index r = 0; r < 11; ++r) labels.push_back(r * 5 % 50);
  labels[3] = -100;
  for (const Index limit : {60, 50}) {
    std::vector<double> expected;
    for (Index r = 0; r < 11; ++r) {
      double sum = 0, top = -INFINITY;
      for (Index c = 0; c < limit; ++c) {
        sum += std::exp(static_cast<double>(logits.row(r)[c]));
        top = std::max(top, static_cast<double>(logits.row(r)[c]));
      }
      expected.push_back(labels[static_cast<std::size_t>(r)] < 0 ? std::log(sum) - top : std::log(sum) - static_cast<double>(logits.row(r)[labels[static_cast<std::size_t>(r)]]));
    }
    for (const int ranks : {1, 2, 3}) {
      Group group(ranks);
      std::vector<std::vector<float>> found(static_cast<std::size_t>(ranks));
      run_ranks(ranks, [&] { group.fail(); }, [&](int rank) {
        CrossEntropy loss({Compute::F32, 1}, labels, limit);
        for (Index lo = rank; lo < 6; lo += ranks) {  // blocks of ten columns
          Tensor block(11, 10);
          for (Index r = 0; r < 11; ++r) std::copy(logits.row(r) + lo * 10, logits.row(r) + lo * 10 + 10, block.row(r));
          loss.add(block, lo * 10);
        }
        LocalComm comm(group, rank);
        found[static_cast<std::size_t>(rank)] = loss.finish(comm);
      });
      for (const auto& of_rank : found)
        for (std::size_t i = 0; i < expected.size(); ++i) REQUIRE(static_cast<double>(of_rank[i]) == doctest::Approx(expected[i]).epsilon(1e-5));
    }
  }
}
