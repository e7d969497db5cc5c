#include "libshard/families/megatron.h"

#include "libshard/error.h"
#include "libshard/translate.h"

#include <doctest/doctest.h>

using namespace shard;

TEST_CASE("expressions") {
  const Params params{{"heads", 8}, {"groups", 2}, {"ratio", 4}};
  CHECK(evaluate("ratio+2", params) == 6);
  CHECK(evaluate("groups*(ratio+2)/3", params) == 4);
  CHECK_THROWS_WITH_AS(evaluate("hidden", params), doctest::Contains("--hidden-size"), Error);
  CHECK_THROWS_AS(evaluate("heads/3", params), Error);
  CHECK_THROWS_AS(evaluate("(heads", params), Error);
  CHECK_THROWS_AS(evaluate("", params), Error);
  CHECK(holds("heads !gated", params));
  CHECK_FALSE(holds("gated", params));
}

TEST_CASE("keys match rows, numbered or stacked") {
  const Params params{{"gated", 1}};
  const Table dist(megatron_rows(), "d");
  const auto numbered = dist.match("decoder.layers.12.mlp.linear_fc2.weight", params);
  REQUIRE(numbered);
  CHECK(numbered->layer == 12);
  const auto stacked = dist.match("decoder.layers.mlp.experts.experts.linear_fc1.weight", params);
  REQUIRE(stacked);
  CHECK(stacked->layers_stacked);
  CHECK(stacked->experts_stacked);
  CHECK(stacked->row->parts.size() == 2);
  CHECK_FALSE(dist.match("decoder.layers.12.mlp.linear_fc9.weight", params));
  const Table modules(megatron_rows(), "lt");
  CHECK(modules.match("decoder.layers.3.mlp.experts.linear_fc1.weight17", params)->expert == 17);
  CHECK(modules.match("mtp.layers.0.mtp_model_layer.self_attention.linear_qkv.weight", params)->depth == 0);
}

TEST_CASE("a fused qkv falls into q, k and v, also where a cut goes through a group") {
  Params params{{"heads", 4}, {"groups", 2}, {"head", 3}, {"hidden", 5}};
  complete(params);
  const Table table(megatron_rows(), "d");
  const auto match = table.match("decoder.layers.0.self_attention.linear_qkv.weight", params);
  REQUIRE(match);
  const auto sizes = factors(*match->row, params);
  CHECK(sizes.stored() == Shape{24, 5});
  for (const Index ways : {1, 2, 4, 8}) {  // 24 rows; 8 ways cut through heads
    ShardedStateDict stored;
    auto& tensor = stored.tensors["decoder.layers.0.self_attention.linear_qkv.weight"];
    tensor = {"decoder.layers.0.self_attention.linear_qkv.weight", DType::F32, {24, 5}, {24, 5}, {}, false};
    for (Index rank = 0; rank < ways; ++rank)
      tensor.shards.push_back({{{rank * 24 / ways, 0}, {24 / ways, 5}}, {static_cast<std::uint32_t>(rank), 0, {20, 4}}, {}});
    stored.streams.resize(static_cast<std::size_t>(ways));
    std::vector<Finding> findings;
    auto logical = to_logical(stored, table, params, {}, findings).logical;
    CHECK(findings.empty());
    CHECK(logical.at("layers.0.attention.q.weight").natural == Shape{12, 5});
    CHECK(logical.at("layers.0.attention.k.weight").natural == Shape{6, 5});
    for (const auto& [key, part] : logical.tensors) {
      check_cover(part, findings);
      CHECK(findings.empty());
    }
  }
}

TEST_CASE("halves of fc1 under keys of their own are what the fused one holds") {
  const Params params{{"gated", 1}, {"hidden", 4}, {"ffn", 8}, {"expert_ffn", 8}, {"shared_ffn", 8}};
  const Table table(megatron_rows(), "d");
  const auto parts = [&](const std::string& key) {
    const auto match = table.match(key, params);
    REQUIRE(match);
    return logical_parts(*match->row, factors(*match->row, params), *match, params);
  };
  for (const std::string module : {"mlp.", "mlp.experts.experts.0.", "mlp.shared_experts."}) {
    const auto key = "decoder.layers.0." + module + "linear_fc1.weight";
    const auto fused = parts(key);
    for (const int half : {0, 1}) {
      const auto apart = parts(key + (half ? "_v" : "_w")).at(0);
      CHECK(apart.name == fused.at(static_cast<std::size_t>(half)).name);
      CHECK(apart.shape == fused.at(static_cast<std::size_t>(half)).shape);
      CHECK(apart.natural == fused.at(static_cast<std::size_t>(half)).natural);
    }
  }
}

TEST_CASE("spelling out finds the rows that hold everything once") {
  ShardedStateDict logical;
  for (const char* key : {"layers.0.mlp.gate.weight", "layers.0.mlp.up.weight", "layers.0.mlp.norm.weight"})
    logical.tensors[key] = {key, DType::BF16, {1, 8, 4}, {8, 4}, {}, false};
  const Params params{{"gated", 1}, {"ffn", 8}, {"hidden", 4}};
  const auto rows = spell_out(logical, Table(megatron_rows(), "l"), params, {nullptr, 1, 0, 0});
  REQUIRE(rows.size() == 2);
  CHECK(rows[0].key == "decoder.layers.0.pre_mlp_layernorm.weight");
  CHECK(rows[1].key == "decoder.layers.0.mlp.linear_fc1.weight");
  CHECK(rows[1].shape == Shape{16, 4});
  CHECK(spell_out(logical, Table(megatron_rows(), "t"), params, {nullptr, 1, 0, 0})[1].key == "decoder.layers.0.mlp.linear_fc1.layer_norm_weight");
  logical.tensors["stranger"] = {"stranger", DType::BF16, {1}, {1}, {}, false};
  CHECK_THROWS_WITH_AS(spell_out(logical, Table(megatron_rows(), "l"), params, {nullptr, 1, 0, 0}), doctest::Contains("stranger"), Error);
}
