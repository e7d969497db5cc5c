// A language module's state dict is the one that libshard gives for its model, stage and tensor rank.
#include "lm/language_module.h"

#include "formats/kernels.h"
#include "libshard/error.h"
#include "libshard/families/megatron.h"
#include "libshard/translate.h"
#include "lm/device.h"
#include "tests/libshard/memory_checkpoint.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>

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

namespace {

/// A checkpoint of `model` with random weights between −1 and 1, the same for the same seed.
testing::Memory filled(const shard::GptModel& model, std::uint32_t seed) {
  auto dict = logical(model);
  for (auto& [name, tensor] : dict.tensors) {
    const auto stream = static_cast<std::uint32_t>(dict.streams.size());
    dict.streams.push_back({});
    dict.streams.back().size = static_cast<std::uint64_t>(shard::volume(tensor.global_shape)) * 4;
    auto bytes = shard::row_major(tensor.global_shape);
    for (auto& stride : bytes) stride *= 4;
    tensor.shards = {{shard::whole(tensor.global_shape), {stream, 0, bytes}, {}}};
  }
  testing::Memory out(dict);
  std::mt19937 random(seed);
  for (auto& bytes : out.bytes())
    for (std::size_t at = 0; at < bytes.size(); at += 4) {
      const auto value = static_cast<float>(random()) * 0x1p-31f - 1;
      std::memcpy(bytes.data() + at, &value, 4);
    }
  return out;
}

/// What setup throws on each of two stages, "" where nothing; the last stage reads `last`.
std::vector<std::string> setup_of(const Case& model, const shard::Reader& first, const shard::Reader& last) {
  WeightSource of_first(first, formats::kernels(), Compute::F32), of_last(last, formats::kernels(), Compute::F32);
  const auto device = host_device();
  device->prepare({1, 2, Compute::F32, 1}, model.config, {});
  Group tensor_a(1), tensor_b(1), pipeline(2);
  std::vector<std::string> out(2);
  run_ranks(2, [&] { pipeline.fail(); }, [&](int p) {
    LocalComm of_tensor(p == 0 ? tensor_a : tensor_b, 0), of_pipeline(pipeline, p);
    LanguageModule module(model.config, p == 0 ? of_first : of_last, placement_of(model.config, p, 2), of_tensor, of_pipeline, device->ops(p, 0));
    try {
      module.setup_embeddings_and_output_layer();
    } catch (const shard::Error& error) {
      out[static_cast<std::size_t>(p)] = error.what();
    }
  });
  return out;
}

}  // namespace

TEST_CASE("a stage that sees another weight is found on every stage, however little a row that is looked at differs") {
  for (const bool tied : {false, true})
    for (const Index depths : {0, 1}) {
      const auto model = small(tied, depths);
      const auto first = filled(model.model, 1);
      CHECK(setup_of(model, first, first) == std::vector<std::string>(2));
      const auto& word = first.describe().tensors.at("embedding.word.weight");
      const auto stream = word.shards[0].place.stream;
      const auto rows = word.global_shape[0], width = word.global_shape[1] * 4, looked = std::min<Index>(rows, 64);
      for (const Index row : {Index{0}, 6 * (rows - 1) / (looked - 1), rows - 1}) {
        auto last = filled(model.model, 1);
        last.bytes()[stream][static_cast<std::size_t>(row * width)] ^= std::byte{1};  // the last bit of one number
        const std::string wanted = tied || depths > 0 ? "embedding.word.weight: its copies on the first and the last stage differ" : "";
        CAPTURE(row);
        for (const auto& said : setup_of(model, first, last)) CHECK(said == wanted);
      }
      // The same numbers in another order: their sum would not tell.
      auto last = filled(model.model, 1);
      auto& table = last.bytes()[stream];
      std::swap_ranges(table.begin(), table.begin() + width, table.begin() + width);
      for (const auto& said : setup_of(model, first, last)) CHECK(said.empty() == !(tied || depths > 0));
    }
}

TEST_CASE("marks of embedding and head, by stage") {
  const std::string word = "embedding.word_embeddings.weight", head = "output_layer.weight";
  using Marks = std::vector<ParameterMarks>;
  const auto marks = [](bool tied, Index depths, bool mup, int stages, int stage) {
    auto [config, model] = small(tied, depths);
    config.use_mup = mup;
    const testing::Memory checkpoint(logical(model));
    WeightSource source(checkpoint, formats::kernels(), Compute::F32);
    const auto device = host_device();
    device->prepare({1, stages, Compute::F32, 1}, config, {});
    Group tensor(1), pipeline(stages);
    LocalComm of_tensor(tensor, 0), of_pipeline(pipeline, stage);
    return LanguageModule(config, source, placement_of(config, stage, stages), of_tensor, of_pipeline, device->ops(stage, 0)).embedding_and_output_marks();
  };
  // {name, embedding or output, embedding of MuP, shared embedding, shared, zero out wgrad}
  CHECK(marks(false, 0, false, 1, 0) == Marks{{word, true}, {head, true}});
  CHECK(marks(false, 0, true, 1, 0) == Marks{{word, true, true}, {head, true, true}});
  CHECK(marks(true, 0, false, 1, 0) == Marks{{word, true, false, false, false, true}});
  CHECK(marks(false, 1, false, 1, 0) == Marks{{word, true, false, false, false, true}, {head, true}});
  CHECK(marks(false, 0, false, 2, 0) == Marks{{word, true}});
  CHECK(marks(false, 0, false, 2, 1) == Marks{{head, true}});
  CHECK(marks(true, 0, true, 3, 0) == Marks{{word, true, true, true}});
  CHECK(marks(true, 0, true, 3, 1) == Marks{});
  CHECK(marks(true, 0, true, 3, 2) == Marks{{head, true, true, true, true}});
  CHECK(marks(false, 1, false, 2, 0) == Marks{{word, true, false, true}});
  CHECK(marks(false, 1, false, 2, 1) == Marks{{word, true, false, true, true}, {head, true}});
  CHECK(marks(true, 1, false, 2, 1) == Marks{{word, true, false, true, true}, {head, true}});
}

TEST_CASE("scale_logits multiplies, and leaves a factor of one alone") {
  auto [config, model] = small(true, 0);
  const testing::Memory checkpoint(logical(model));
  WeightSource source(checkpoint, formats::kernels(), Compute::F32);
  for (const double factor : {1.0, 0.25}) {
    config.logits_multiplier = factor;
    const auto device = host_device();
    device->prepare({1, 1, Compute::F32, 1}, config, {});
    Group tensor(1), pipeline(1);
    LocalComm of_tensor(tensor, 0), of_pipeline(pipeline, 0);
    const LanguageModule module(config, source, placement_of(config, 0, 1), of_tensor, of_pipeline, device->ops(0, 0));
    Tensor logits(1, 3);
    for (Index c = 0; c < 3; ++c) logits.row(0)[c] = static_cast<float>(8 * c - 4);
    module.scale_logits(logits);
    for (Index c = 0; c < 3; ++c) CHECK(logits.row(0)[c] == static_cast<float>(factor * static_cast<double>(8 * c - 4)));
  }
}
