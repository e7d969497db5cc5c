// State dicts of ranks by themselves: together they hold a model once, and corner cases that Megatron's rules name.
#include "libshard/rank_state_dict.h"

#include "libshard/error.h"
#include "libshard/families/megatron.h"
#include "libshard/translate.h"

#include <doctest/doctest.h>

#include <algorithm>

using namespace shard;

namespace {

GptModel llama() {
  GptModel out;
  out.params = {{"layers", 4}, {"hidden", 32}, {"ffn", 96}, {"heads", 8}, {"groups", 4}, {"vocab", 128}, {"gated", 1}, {"tied", 1}};
  complete(out.params);
  return out;
}

GptModel everything() {
  auto out = llama();
  for (const auto& [name, value] : Params{{"experts", 4}, {"expert_ffn", 40}, {"shared_ffn", 48}, {"shared_gate", 1}, {"expert_bias", 1}, {"mtp", 2},
                                          {"mla", 1}, {"q_lora", 16}, {"kv_lora", 24}, {"nope", 8}, {"rope_dim", 4}, {"value_head", 6}, {"qk_norm", 1}})
    out.params[name] = value;
  out.params["tied"] = 0;
  out.moe_layers = {false, true, true, true};
  out.non_homogeneous_layers = true;
  return out;
}

Parallel sizes(Index tp, Index pp = 1, Index vpp = 1, Index ep = 1, Index etp = 0) {
  Parallel out;
  out.tp = tp;
  out.etp = etp ? etp : tp;
  out.pp = pp;
  out.vpp = vpp;
  out.ep = ep;
  return out;
}

Index depths(const GptModel& model) { return model.params.contains("mtp") ? model.params.at("mtp") : 0; }

RankStateDict of(const GptModel& model, const Parallel& parallel, const RankPlace& place) {
  return sharded_state_dict(model, parallel, place_layers(parallel, model.params.at("layers"), depths(model)), place);
}

const LocalTensor* find(const RankStateDict& dict, const std::string& name) {
  const auto found = std::find_if(dict.tensors.begin(), dict.tensors.end(), [&](const auto& tensor) { return tensor.name == name; });
  return found == dict.tensors.end() ? nullptr : &*found;
}

/// The main replicas of all ranks as one stored checkpoint; every cell of a tensor's grid must have exactly one.
ShardedStateDict stored(const GptModel& model, const Parallel& parallel, Index data) {
  ShardedStateDict out;
  out.streams.push_back({});
  for (Index p = 0; p < parallel.pp; ++p)
    for (Index chunk = 0; chunk < parallel.vpp; ++chunk)
      for (Index t = 0; t < parallel.tp; ++t)
        for (Index d = 0; d < data; ++d)
          for (const auto& local : of(model, parallel, {p, chunk, t, d}).tensors) {
            if (local.replica_id != ReplicaId{}) continue;
            auto& tensor = out.tensors[local.key];
            if (tensor.key.empty()) tensor = {local.key, local.dtype, local.global_shape, local.global_shape, {}, local.allow_shape_mismatch};
            CHECK(tensor.global_shape == local.global_shape);
            Box box{local.global_offset, Shape(static_cast<std::size_t>(local.prepend_axis_num), 1)};
            box.size.insert(box.size.end(), local.local_shape.begin(), local.local_shape.end());
            for (std::size_t i = 0; i < box.size.size(); ++i) CHECK(local.axis_fragmentations[i] * box.size[i] == local.global_shape[i]);
            for (const auto& other : tensor.shards) CHECK_FALSE(other.box == box);
            tensor.shards.push_back({box, {0, 0, row_major(box.size)}, {}});
          }
  return out;
}

void check_whole(const GptModel& model, const Parallel& parallel, Index data) {
  std::vector<Finding> findings;
  const auto all = stored(model, parallel, data);
  for (const auto& [key, tensor] : all.tensors) check_cover(tensor, findings);
  const Table table(megatron_rows(), "d");
  const auto logical = to_logical(all, table, model.params, {}, findings).logical;
  check_expected(logical, table, model.params, {nullptr, 4, model.params.contains("experts") ? 4 : 0, depths(model), model.moe_layers}, findings);
  for (const auto& finding : findings) FAIL_CHECK(finding.key << ": " << finding.message);
  CHECK_FALSE(logical.tensors.empty());
}

}  // namespace

TEST_CASE("all ranks together hold the model once, under keys that the checkpoint's table spells") {
  for (const auto spec : {LayerSpec::Local, LayerSpec::TransformerEngine})
    for (const bool apart : {false, true}) {
      auto dense = llama(), mixed = everything();
      dense.spec = mixed.spec = spec;
      dense.singleton_local_shards = mixed.singleton_local_shards = apart;
      check_whole(dense, sizes(1), 2);
      check_whole(dense, sizes(8, 2, 2), 2);  // more tensor ranks than query groups
      check_whole(mixed, sizes(2, 2, 2, 2), 2);
      check_whole(mixed, sizes(4, 2, 1, 4, 1), 1);
      check_whole(mixed, sizes(2, 1, 1, 2, 1), 2);
    }
}

TEST_CASE("a tied head: one module, a copy on the last stage, nothing where MTP holds the embedding") {
  const auto alone = of(llama(), sizes(2), {0, 0, 1, 3});
  CHECK(find(alone, "output_layer.weight") == nullptr);
  const auto last = of(llama(), sizes(2, 2), {1, 0, 1, 3});
  CHECK(find(last, "embedding.word_embeddings.weight") == nullptr);
  const auto* head = find(last, "output_layer.weight");
  REQUIRE(head);
  CHECK(head->key == "embedding.word_embeddings.weight");
  CHECK(head->replica_id == ReplicaId{1, 0, 3});
  CHECK(head->allow_shape_mismatch);
  CHECK(head->global_offset == Shape{64, 0});
  auto mtp = llama();
  mtp.params["mtp"] = 1;
  const auto stage = of(mtp, sizes(2, 2), {1, 0, 1, 3});
  CHECK(find(stage, "output_layer.weight") == nullptr);
  REQUIRE(find(stage, "embedding.word_embeddings.weight"));
  CHECK(find(stage, "embedding.word_embeddings.weight")->replica_id == ReplicaId{1, 0, 3});
}

TEST_CASE("tying refuses a head where there should be none, and none where there should be one") {
  RankStateDict with, without;
  with.tensors.push_back({"output_layer.weight", "output_layer.weight", DType::BF16, {4, 2}, {4, 2}, {0, 0}, {1, 1}, 0, {}, false});
  const auto tie = [](RankStateDict dict, StageRole role) {
    tie_embeddings_and_output_weights_state_dict(dict, role, "output_layer.weight", "embedding.word_embeddings.weight", 5);
    return dict;
  };
  CHECK_THROWS_AS(tie(with, {false, false, false}), Error);
  CHECK_THROWS_AS(tie(with, {false, true, true}), Error);
  CHECK_THROWS_AS(tie(without, {false, true, false}), Error);
  CHECK(tie(without, {true, false, false}).tensors.empty());
  CHECK(tie(with, {true, true, false}).tensors[0].key == "output_layer.weight");
  CHECK(tie(with, {false, true, false}).tensors[0].replica_id == ReplicaId{1, 0, 5});
}

TEST_CASE("layers stack on an axis of their own; names count from the stage's first layer, keys from the model's") {
  const auto stacked = of(llama(), sizes(2, 2, 2), {1, 1, 1, 0});
  const auto* qkv = find(stacked, "decoder.layers.0.self_attention.linear_qkv.weight");
  REQUIRE(qkv);
  CHECK(qkv->key == "decoder.layers.self_attention.linear_qkv.weight");
  CHECK(qkv->global_shape == Shape{4, 64, 32});
  CHECK(qkv->global_offset == Shape{3, 32, 0});
  CHECK(qkv->prepend_axis_num == 1);
  auto numbered = llama();
  numbered.non_homogeneous_layers = true;
  qkv = find(of(numbered, sizes(2, 2, 2), {1, 1, 1, 0}), "decoder.layers.0.self_attention.linear_qkv.weight");
  REQUIRE(qkv);
}

TEST_CASE("copies: of what tensor ranks share by tensor rank, of experts by their own data rank, of expert biases by expert tensor rank") {
  auto model = everything();
  model.params["mlp_bias"] = 1;
  const auto dict = of(model, sizes(2, 1, 1, 2), {0, 0, 1, 3});  // the stage's rank 7: second expert tensor rank, second expert rank, second copy
  CHECK(find(dict, "decoder.final_layernorm.weight")->replica_id == ReplicaId{0, 1, 3});
  CHECK(find(dict, "decoder.layers.1.mlp.router.weight")->replica_id == ReplicaId{0, 1, 3});
  CHECK(find(dict, "decoder.layers.1.mlp.shared_experts.linear_fc1.weight")->replica_id == ReplicaId{0, 0, 3});
  const auto* fc2 = find(dict, "decoder.layers.1.mlp.experts.local_experts.1.linear_fc2.weight");
  REQUIRE(fc2);
  CHECK(fc2->replica_id == ReplicaId{0, 0, 1});
  CHECK(fc2->key == "decoder.layers.1.mlp.experts.experts.linear_fc2.weight");
  CHECK(fc2->global_offset == Shape{3, 0, 20});
  CHECK(find(dict, "decoder.layers.1.mlp.experts.local_experts.1.linear_fc2.bias")->replica_id == ReplicaId{0, 1, 1});
  CHECK(find(dict, "decoder.layers.1.mlp.router.expert_bias")->dtype == DType::F32);
}

TEST_CASE("a gated fc1 is two tensors of one key, or two keys") {
  auto model = llama();
  const auto halves = [&] {
    std::vector<LocalTensor> out;
    for (const auto& tensor : of(model, sizes(2), {0, 0, 1, 0}).tensors)
      if (tensor.name == "decoder.layers.2.mlp.linear_fc1.weight") out.push_back(tensor);
    return out;
  };
  const auto together = halves();
  REQUIRE(together.size() == 2);
  CHECK(together[0].global_offset == Shape{2, 48, 0});
  CHECK(together[1].global_offset == Shape{2, 144, 0});
  CHECK(together[1].axis_fragmentations == Shape{4, 4, 1});
  model.singleton_local_shards = true;
  const auto apart = halves();
  REQUIRE(apart.size() == 2);
  CHECK(apart[1].key == "decoder.layers.2.mlp.linear_fc1.weight_v");
  CHECK(apart[1].global_shape == Shape{96, 32});
  CHECK(apart[1].global_offset == Shape{48, 0});
}

TEST_CASE("Transformer Engine's modules: norms inside linears, experts of one module, extra states of norms and of MTP's attention") {
  auto model = everything();
  model.spec = LayerSpec::TransformerEngine;
  const auto dict = of(model, sizes(2, 1, 1, 2), {0, 0, 1, 1});
  const auto* up = find(dict, "decoder.layers.1.mlp.experts.linear_fc1.weight1");
  REQUIRE(up);
  CHECK(up->key == "decoder.layers.1.mlp.experts.experts.linear_fc1.weight");
  CHECK(up->global_offset[0] == 3);
  CHECK(find(dict, "decoder.layers.1.self_attention.linear_q_up_proj.layer_norm_weight"));
  CHECK(find(dict, "decoder.layers.1.self_attention.linear_kv_down_proj.weight")->replica_id == ReplicaId{0, 1, 1});  // not cut here
  const auto has = [&](const std::string& name) {
    return std::any_of(dict.objects.begin(), dict.objects.end(), [&](const auto& object) { return object.name == name; });
  };
  CHECK_FALSE(has("decoder.layers.1.self_attention.core_attention._extra_state"));
  CHECK(has("mtp.layers.1.transformer_layer.self_attention.core_attention._extra_state"));
  CHECK(has("decoder.final_layernorm._extra_state"));
  CHECK_FALSE(has("decoder.layers.1.mlp.router._extra_state"));
  CHECK(has("decoder.layers.1.mlp.experts.linear_fc1._extra_state"));
  CHECK(has("decoder.layers.1.mlp.experts.linear_fc1._extra_state1"));
}

TEST_CASE("a prefix stands before every name and key; places and cuts that cannot be are refused") {
  const auto model = llama();
  const auto parallel = sizes(2, 2);
  const auto pipeline = place_layers(parallel, 4);
  for (const auto& tensor : sharded_state_dict(model, parallel, pipeline, {1, 0, 1, 0}, "model.").tensors) {
    CHECK(tensor.key.starts_with("model."));
    CHECK(tensor.name.starts_with("model."));
  }
  CHECK_THROWS_AS(sharded_state_dict(model, parallel, pipeline, {2, 0, 0, 0}), Error);
  CHECK_THROWS_AS(sharded_state_dict(model, parallel, pipeline, {0, 1, 0, 0}), Error);
  CHECK_THROWS_AS(sharded_state_dict(model, parallel, pipeline, {0, 0, 2, 0}), Error);
  CHECK_THROWS_AS(sharded_state_dict(model, parallel, pipeline, {0, 0, 0, -1}), Error);
  CHECK_THROWS_AS(of(model, sizes(3), {}), Error);
  CHECK_THROWS_AS(of(everything(), sizes(1, 1, 1, 3), {}), Error);
}
