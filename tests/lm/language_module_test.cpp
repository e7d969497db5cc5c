// A language module's state dict is the one that libshard gives for its model, stage and tensor rank.
#include "lm/language_module.h"

#include "formats/kernels.h"
#include "libshard/error.h"
#include "libshard/families/megatron.h"
#include "libshard/translate.h"
#include "lm/device.h"
#include "lm/model_run.h"
#include "tests/libshard/memory_checkpoint.h"

#include <doctest/doctest.h>

#include <cmath>

using namespace lm;

namespace {

struct Case {
  shard::TransformerConfig config;
  shard::GptModel model;
};

Case small(bool tied, Index depths) {
  Case out;
  auto& config = out.config;
  config.num_layers = 3;
  config.hidden_size = 16;
  config.ffn_hidden_size = 24;
  config.num_attention_heads = 4;
  config.num_query_groups = 2;
  config.kv_channels = 4;
  config.layers.resize(3);
  config.tied = tied;
  config.mtp_num_layers = depths;
  out.model.dtype = shard::DType::F32;
  out.model.params = {{"layers", 3}, {"hidden", 16}, {"ffn", 24}, {"heads", 4}, {"groups", 2}, {"head", 4}, {"vocab", 32}, {"gated", 1}, {"qk_norm", 1}, {"tied", tied}, {"mtp", depths}};
  shard::complete(out.model.params);
  out.model.moe_layers = {false, false, false};
  return out;
}

/// The logical tensors of a checkpoint of that model, without bytes.
shard::ShardedStateDict logical(const shard::GptModel& model) {
  shard::ShardedStateDict stored;
  stored.streams.push_back({});
  for (const auto& tensor : shard::sharded_state_dict(model, {}, shard::place_layers({}, 3, model.params.at("mtp")), {}).tensors) {
    auto& into = stored.tensors[tensor.key];
    into = {tensor.key, tensor.dtype, tensor.global_shape, tensor.global_shape, {}, tensor.allow_shape_mismatch};
    into.shards = {{shard::whole(tensor.global_shape), {0, 0, shard::row_major(tensor.global_shape)}, {}}};
  }
  std::vector<shard::Finding> findings;
  auto out = to_logical(stored, shard::Table(shard::megatron_rows(), "d"), model.params, {}, findings).logical;
  refuse(findings);
  if (model.params.at("tied")) out.ties["output.weight"] = "embedding.word.weight";
  return out;
}

}  // namespace

TEST_CASE("sharded_state_dict of every stage and tensor rank, stages uneven") {
  for (const bool tied : {false, true})
    for (const Index depths : {0, 1}) {
      const auto [config, model] = small(tied, depths);
      const testing::Memory checkpoint(logical(model));
      WeightSource source(checkpoint, formats::kernels(), Compute::F32);
      const auto device = host_device();
      device->prepare({2, 2, Compute::F32, 1}, config, {});
      Group tensor(2), pipeline(2);
      for (int p = 0; p < 2; ++p)
        for (int t = 0; t < 2; ++t) {
          LocalComm of_tensor(tensor, t), of_pipeline(pipeline, p);
          const LanguageModule module(config, source, placement_of(config, p, 2), of_tensor, of_pipeline, device->ops(p, t));
          auto dict = module.sharded_state_dict("");
          shard::Parallel parallel;
          parallel.tp = parallel.etp = parallel.pp = 2;
          const auto wanted = shard::sharded_state_dict(model, parallel, pipeline_of(config, 2), {p, 0, t, 0});
          REQUIRE(dict.tensors.size() == wanted.tensors.size());
          CHECK(dict.objects.size() == wanted.objects.size());
          for (std::size_t i = 0; i < wanted.tensors.size(); ++i) {
            CHECK(dict.tensors[i].key == wanted.tensors[i].key);
            CHECK(dict.tensors[i].global_offset == wanted.tensors[i].global_offset);
            CHECK(dict.tensors[i].replica_id == wanted.tensors[i].replica_id);
            CHECK(dict.tensors[i].dtype == shard::DType::F32);
          }
          module.tie_embeddings_and_output_weights_state_dict(dict, "output_layer.weight", "embedding.word_embeddings.weight");
          const auto copies = std::count_if(dict.tensors.begin(), dict.tensors.end(), [](const auto& one) { return one.key == "embedding.word_embeddings.weight"; });
          CHECK(copies == (p == 0 || tied || depths > 0));
        }
    }
}

TEST_CASE("label smoothing: each tensor rank's mean runs over its own columns") {
  const auto [config, model] = small(true, 0);
  const testing::Memory checkpoint(logical(model));
  WeightSource source(checkpoint, formats::kernels(), Compute::F32);
  constexpr Index kVocab = 32, kRows = 4;
  const std::vector<Index> labels{0, 17, 31, -100};
  const auto logit = [](Index r, Index c) { return 3 * std::sin(static_cast<double>(r * 37 + c * 5)); };
  for (const int ranks : {1, 2}) {
    const auto device = host_device();
    device->prepare({ranks, 1, Compute::F32, 1}, config, {});
    Group tensor(ranks), pipeline(1);
    std::vector<std::vector<float>> plain(static_cast<std::size_t>(ranks)), smooth = plain;
    const auto columns = kVocab / ranks;
    run_ranks(ranks, [&] { tensor.fail(); }, [&](int t) {
      LocalComm of_tensor(tensor, t), of_pipeline(pipeline, 0);
      LanguageModule module(config, source, placement_of(config, 0, 1), of_tensor, of_pipeline, device->ops(0, t));
      Tensor logits(kRows, columns);
      for (Index r = 0; r < kRows; ++r)
        for (Index c = 0; c < columns; ++c) logits.row(r)[c] = static_cast<float>(logit(r, t * columns + c));
      plain[static_cast<std::size_t>(t)] = module.compute_language_model_loss(labels, logits, t * columns, kVocab);
      smooth[static_cast<std::size_t>(t)] = module.compute_language_model_loss(labels, logits, t * columns, kVocab, 0.1);
      if (ranks == 1) CHECK_THROWS_AS(module.compute_language_model_loss(labels, logits, 0, kVocab, 1), shard::Error);
    });
    for (int t = 0; t < ranks; ++t)
      for (Index r = 0; r < kRows; ++r) {
        double sum = 0, top = -INFINITY, mean = 0;
        for (Index c = 0; c < kVocab; ++c) {
          sum += std::exp(logit(r, c));
          top = std::max(top, logit(r, c));
        }
        for (Index c = 0; c < columns; ++c) mean += (logit(r, t * columns + c) - std::log(sum)) / static_cast<double>(columns);
        const auto at = static_cast<std::size_t>(r);
        const auto loss = labels[at] < 0 ? std::log(sum) - top : std::log(sum) - logit(r, labels[at]);
        const auto smoothing = 0.1 * static_cast<double>(columns) / static_cast<double>(columns - 1);
        CHECK(static_cast<double>(plain[static_cast<std::size_t>(t)][at]) == doctest::Approx(loss).epsilon(1e-5));
        CHECK(static_cast<double>(smooth[static_cast<std::size_t>(t)][at]) == doctest::Approx((1 - smoothing) * loss - smoothing * mean).epsilon(1e-5));
      }
  }
}

TEST_CASE("parts of a feed-forward that do not fit each other are refused") {
  const auto [config, model] = small(false, 0);
  const Batch batch{1, 2, {1, 2}, {2, 3}, {0, 1}};
  const auto run = [&](const std::string& weight, shard::Shape shape) {
    auto dict = logical(model);
    for (auto& stream : dict.streams) stream.size = 1 << 16;
    if (!weight.empty()) {
      auto& tensor = dict.tensors.at(weight);
      tensor.global_shape = tensor.natural = shape;
      tensor.shards = {{shard::whole(shape), {0, 0, shard::row_major(shape)}, {}}};
    }
    const testing::Memory checkpoint(dict);
    run_model(checkpoint, formats::kernels(), config, {batch, {}, 32, 32, {}, false}, {}, *host_device());
  };
  run("", {});
  for (const auto* part : {"gate", "up"})
    for (const Index rows : {0, 8, 32}) CHECK_THROWS_AS(run(std::string("layers.1.mlp.") + part + ".weight", {rows, 16}), shard::Error);
  CHECK_THROWS_AS(run("layers.1.mlp.down.weight", {16, 8}), shard::Error);
}
