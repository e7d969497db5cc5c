// A weight's parts: together the whole of it, each what a layer of that rank expects.
#include "lm/parts.h"

#include "libshard/error.h"

#include <doctest/doctest.h>

using namespace lm;
using shard::Box;

namespace {

shard::TransformerConfig heads(Index heads, Index groups) {
  shard::TransformerConfig out;
  out.num_attention_heads = heads;
  out.num_query_groups = groups;
  return out;
}

/// How often each number of the weight is held.
std::vector<int> cover(const shard::TransformerConfig& config, const std::string& name, Sides whole, int ranks) {
  std::vector<int> out(static_cast<std::size_t>(whole.rows * whole.columns));
  for (int r = 0; r < ranks; ++r) {
    const auto box = part_of(config, name, whole, {r, ranks});
    for (Index row = box.lo[0]; row < box.lo[0] + box.size[0]; ++row)
      for (Index column = box.lo[1]; column < box.lo[1] + box.size[1]; ++column) ++out[static_cast<std::size_t>(row * whole.columns + column)];
  }
  return out;
}

}  // namespace

TEST_CASE("what ranks share is held once, the rest by each") {
  const auto config = heads(12, 12);
  for (const int ranks : {1, 2, 3, 5}) {
    for (const auto* name : {"attention.q.weight", "attention.k.weight", "attention.v.weight", "attention.q_up.weight", "attention.kv_up.weight", "attention.out.weight", "mlp.gate.weight",
                             "mlp.experts.3.up.weight", "mlp.shared.down.weight"})
      CHECK(cover(config, std::string("layers.1.") + name, {24, 36}, ranks) == std::vector<int>(24 * 36, 1));
    for (const auto* name : {"layers.0.attention.q.bias", "mtp.0.layer.mlp.up.bias", "layers.0.attention.sinks", "layers.0.attention.out.bias", "layers.0.mlp.down.bias"})
      CHECK(cover(config, name, {1, 12}, ranks) == std::vector<int>(12, 1));
    for (const auto* name : {"embedding.word.weight", "output.weight"}) CHECK(cover(config, name, {31, 2}, ranks) == std::vector<int>(62, 1));
    for (const auto* name : {"layers.0.attention.norm.weight", "layers.0.attention.q_norm.weight", "layers.0.attention.q_down.weight", "layers.0.attention.kv_down.weight", "layers.0.mlp.router.weight",
                             "layers.0.mlp.router.expert_bias", "layers.0.mlp.shared.gate_weight", "mtp.0.eh_proj.weight", "final_norm.bias", "embedding.position.weight"})
      CHECK(cover(config, name, {4, 6}, ranks) == std::vector<int>(24, ranks));
  }
  CHECK(part_of(config, "layers.0.mlp.down.bias", {1, 12}, {0, 2}) == Box{{0, 0}, {1, 12}});
  CHECK(shard::empty(part_of(config, "layers.0.mlp.down.bias", {1, 12}, {1, 2})));
}

TEST_CASE("where there are more ranks than groups, neighbours hold the same keys") {
  const auto config = heads(6, 2);
  const auto rows = [&](int rank, int ranks) {
    const auto box = part_of(config, "layers.0.attention.k.weight", {8, 5}, {rank, ranks});
    return std::pair{box.lo[0], box.size[0]};
  };
  CHECK(rows(0, 2) == std::pair<Index, Index>{0, 4});
  CHECK(rows(0, 3) == std::pair<Index, Index>{0, 4});
  CHECK(rows(1, 3) == std::pair<Index, Index>{0, 8});  // heads 2 and 3 read both groups
  CHECK(rows(2, 3) == std::pair<Index, Index>{4, 4});
  CHECK(rows(5, 6) == std::pair<Index, Index>{4, 4});
}

TEST_CASE("what cannot be cut is refused") {
  const auto config = heads(4, 2);
  CHECK_THROWS_WITH_AS(part_of(config, "layers.0.attention.q.weight", {10, 5}, {0, 2}), doctest::Contains("layers.0.attention.q.weight: has 10 numbers along the side that 4 heads share"), shard::Error);
  CHECK_THROWS_WITH_AS(part_of(config, "layers.0.mlp.up.weight", {2, 5}, {0, 3}), doctest::Contains("tensor parallel size 3 for 2 rows of layers.0.mlp.up.weight"), shard::Error);
}

TEST_CASE("a use is needed where its rows and the part meet") {
  const Parts parts{{"output.weight", {shard::DType::F32, {{10, 0}, {5, 4}}}}};
  for (const auto& [lo, count, needed] : {std::tuple<Index, Index, bool>{0, 10, false}, {0, 11, true}, {14, 3, true}, {15, 3, false}, {0, -1, true}, {15, -1, false}})
    CHECK(needs(parts, {"output.weight", lo, count}) == needed);
  CHECK(!needs(parts, {"layers.0.mlp.down.bias"}));
}
