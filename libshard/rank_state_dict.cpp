// Rows of the family's table, one rank's part of each, as Megatron's modules wrap their parameters.
#include "libshard/rank_state_dict.h"

#include "libshard/error.h"
#include "libshard/families/megatron.h"

#include <algorithm>

namespace shard {
namespace {

constexpr const char* kEmbedding = "embedding.word_embeddings.weight";
constexpr const char* kOutput = "output_layer.weight";

void replace(std::string& text, std::string_view what, std::string_view by) {
  if (const auto at = text.find(what); at != text.npos) text.replace(at, what.size(), by);
}

class Builder {
 public:
  Builder(const GptModel& model, const Parallel& parallel, const Pipeline& pipeline, const RankPlace& place, const std::string& prefix)
      : model_(model), parallel_(parallel), pipeline_(pipeline), place_(place), prefix_(prefix), params_(model.params),
        chunk_{place.pipeline, place.chunk}, cell_(cell_of(parallel, place.tensor + parallel.tp * place.data)),
        stacked_(!model.non_homogeneous_layers && !model.singleton_local_shards), layers_(size("layers")), experts_(size("experts")), depths_(size("mtp")) {
    check();
    role_ = role_of(pipeline, chunk_, depths_);
    tied_ = size("tied") != 0;
    params_["tied"] = !owns_output_weight(role_, tied_);  // the output row asks for no more than this
  }

  RankStateDict build() {
    const Table table(megatron_rows(), model_.spec == LayerSpec::Local ? "l" : "t");
    for (const auto& row : table.rows()) add_row(row);
    if (tied_) tie_embeddings_and_output_weights_state_dict(out_, role_, prefix_ + kOutput, prefix_ + kEmbedding, place_.data);
    return std::move(out_);
  }

 private:
  Index size(const char* name) const {
    const auto found = params_.find(name);
    return found == params_.end() ? 0 : found->second;
  }

  void check() const {
    const auto inside = [](const char* what, Index value, Index end) {
      require(value >= 0 && value < end, Code::BadLayout, [&] { return fmt::format("rank: {} {}; there are {}", what, value, end); });
    };
    inside("pipeline rank", place_.pipeline, pipeline_.stages);
    inside("virtual stage", place_.chunk, pipeline_.chunks);
    inside("tensor rank", place_.tensor, parallel_.tp);
    require(place_.data >= 0, Code::BadLayout, [&] { return fmt::format("rank: data rank {}", place_.data); });
    check_tensor_parallel(params_, parallel_.tp, parallel_.etp);
    require(experts_ % parallel_.ep == 0, Code::BadLayout,
            [&] { return fmt::format("layout: {} experts cannot be divided by expert parallel size {}", experts_, parallel_.ep); });
    require(model_.moe_layers.empty() || static_cast<Index>(model_.moe_layers.size()) == layers_, Code::Mismatch,
            [&] { return fmt::format("model: {} layers; {} are said to have experts or not", layers_, model_.moe_layers.size()); });
  }

  bool is_moe(Index layer) const {
    if (experts_ == 0) return false;
    return model_.moe_layers.empty() || model_.moe_layers[static_cast<std::size_t>(layer)];
  }

  /// Every instance of the row on this rank.
  void add_row(const Row& row) {
    switch (row.stage) {
      case Stage::Embedding:  // LanguageModelEmbedding is built as a whole where MTP embeds tokens
        if (role_.pre_process || role_.mtp_process) add_instance(row, false, -1, -1, -1);
        return;
      case Stage::Layer: {
        const auto& here = pipeline_.at(chunk_);
        for (std::size_t i = 0; i < here.size(); ++i) add_instance(row, is_moe(here[i]), static_cast<Index>(i), here[i], -1);
        return;
      }
      case Stage::FinalNorm:
        if (pipeline_.final_norm == chunk_) add_instance(row, false, -1, -1, -1);
        return;
      case Stage::Mtp:  // its layers are of the last decoder layer's kind; the module is mtp_model_layer in newer cores, never the key
        if (row.key.find("mtp_model_layer") != row.key.npos) return;
        for (Index k = 0; role_.mtp_process && k < depths_; ++k) add_instance(row, is_moe(layers_ - 1), -1, -1, k);
        return;
      case Stage::Output:
        if (role_.post_process) add_instance(row, false, -1, -1, -1);
        return;
    }
  }

  void add_instance(const Row& row, bool moe, Index local_layer, Index layer, Index depth) {
    params_["moe"] = moe;
    if (!holds(row.when, params_)) return;
    const bool numbered = row.key.find("{e}") != row.key.npos;
    const auto count = numbered ? experts_ / parallel_.ep : 1;
    for (Index e = 0; e < count; ++e) {
      Instance one{row, layer, numbered ? cell_.expert * count + e : -1, depth, {}, {}, {}, {}};
      one.name = prefix_ + spell(row.key, local_layer, e, depth);
      one.key = prefix_ + key_of(row, one);
      if (layer >= 0 && stacked_) one.prepend(layer, layers_);
      if (one.expert >= 0 && !model_.singleton_local_shards) one.prepend(one.expert, experts_);
      add_tensors(one);
      add_objects(one, e);
    }
  }

  struct Instance {
    const Row& row;
    Index layer, expert, depth;
    std::string name, key;
    Shape offset, extent;  ///< along the prepended axes
    void prepend(Index at, Index of) {
      offset.push_back(at);
      extent.push_back(of);
    }
  };

  /// The module's name as checkpoints spell it. Sources: sharded_state_dict_keys_map of the local layer spec, replace_prefix_for_sharding
  /// in SequentialMLP, TEGroupedMLP and TransformerBlock.
  std::string key_of(const Row& row, const Instance& one) const {
    auto key = row.key;
    if (model_.spec == LayerSpec::Local) {
      replace(key, ".local_experts.", ".experts.");
      if (size("mla") == 0) {
        replace(key, ".input_layernorm.", ".self_attention.linear_qkv.layer_norm_");
        replace(key, ".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_");
      }
    } else if (one.expert >= 0) {
      replace(key, ".mlp.experts.", ".mlp.experts.experts.{e}.");
      key.erase(key.rfind("{e}"));
    }
    if (stacked_) key = without(key, "{l}");
    if (!model_.singleton_local_shards) key = without(key, "{e}");
    return spell(key, one.layer, one.expert, one.depth);
  }

  /// Copies along tensor ranks count where the tensor is not cut; experts count their own data ranks.
  ReplicaId replica(const Row& row, bool expert) const {
    const bool cut = row.cut >= 0;
    if (expert) return {0, cut ? 0 : static_cast<int>(cell_.expert_tensor), static_cast<int>(cell_.rank_in_stage / (parallel_.etp * parallel_.ep))};
    const bool copy = row.stage == Stage::Embedding && row.vocabulary && !role_.pre_process;
    return {copy ? 1 : 0, cut ? 0 : static_cast<int>(place_.tensor), static_cast<int>(place_.data)};
  }

  void add_tensors(const Instance& one) {
    const auto& row = one.row;
    const auto shape = factors(row, params_).stored();
    LocalTensor whole{one.name, one.key, model_.dtype, shape, one.extent, one.offset, one.extent, static_cast<Index>(one.extent.size()),
                      replica(row, one.expert >= 0), row.vocabulary};
    if (row.key.ends_with("expert_bias")) whole.dtype = DType::F32;  // TopKRouter._maintain_float32_expert_bias
    whole.global_shape.insert(whole.global_shape.end(), shape.begin(), shape.end());
    whole.global_offset.resize(whole.global_shape.size(), 0);
    whole.axis_fragmentations.resize(whole.global_shape.size(), 1);
    const auto side = side_of(row, parallel_, cell_);
    if (side.dim < 0) {
      out_.tensors.push_back(std::move(whole));
      return;
    }
    const auto dim = static_cast<std::size_t>(side.dim), axis = dim + one.extent.size();
    const bool apart = row.pieces > 1 && model_.singleton_local_shards;
    const auto half = shape[dim] / row.pieces;
    const auto pieces = cut(shape[dim], row.pieces, side.ways, side.rank);
    for (std::size_t i = 0; i < pieces.size(); ++i) {
      auto tensor = whole;
      tensor.local_shape[dim] = pieces[i].size;
      tensor.global_offset[axis] = pieces[i].lo - (apart ? static_cast<Index>(i) * half : 0);
      tensor.axis_fragmentations[axis] = side.ways * (apart ? 1 : row.pieces);
      if (apart) {
        tensor.global_shape[axis] = half;
        tensor.key += i == 0 ? "_w" : "_v";
      }
      out_.tensors.push_back(std::move(tensor));
    }
  }

  /// Linears have an extra state; so do all modules of Transformer Engine 2, of which attention saves its own with its sinks only
  /// (TEDotProductAttention.sharded_state_dict), but for MTP layers, where the block's default adds it (MultiTokenPredictionBlock).
  void add_objects(const Instance& one, Index local_expert) {
    const bool engine = model_.spec == LayerSpec::TransformerEngine;
    for (const std::string_view parameter : {".weight", ".softmax_offset"}) {
      if (!one.key.ends_with(parameter)) continue;
      const auto module = one.key.substr(0, one.key.size() - parameter.size());
      const bool attention = module.ends_with(".core_attention");
      if (!has_extra_state(module) && !(engine && (attention || module.ends_with("norm")))) continue;
      auto name = one.name.substr(0, one.name.rfind(parameter));
      const auto number = engine && local_expert > 0 ? std::to_string(local_expert) : "";
      add_object(one, name, module, number);
      if (!engine || one.row.stage != Stage::Mtp || size("sinks") != 0 || !module.ends_with(".linear_proj")) continue;
      auto core = module;
      replace(name, ".linear_proj", ".core_attention");
      replace(core, ".linear_proj", ".core_attention");
      add_object(one, name, core, "");
    }
  }

  void add_object(const Instance& one, const std::string& name, const std::string& module, const std::string& number) {
    LocalObject object{name + "._extra_state" + number, module + "._extra_state", one.extent, one.offset, replica({}, one.expert >= 0)};
    if (object.global_shape.empty()) object.global_shape = {1}, object.global_offset = {0};
    out_.objects.push_back(std::move(object));
  }

  const GptModel& model_;
  const Parallel& parallel_;
  const Pipeline& pipeline_;
  const RankPlace& place_;
  const std::string& prefix_;
  Params params_;
  Chunk chunk_;
  Cell cell_;
  bool stacked_, tied_ = false;
  Index layers_, experts_, depths_;
  StageRole role_;
  RankStateDict out_;
};

}  // namespace

StageRole role_of(const Pipeline& pipeline, Chunk chunk, Index mtp_layers) {
  return {chunk == pipeline.embedding, chunk == pipeline.output, mtp_layers > 0 && chunk == pipeline.mtp};
}

bool owns_output_weight(const StageRole& role, bool tied) {
  return role.post_process && !(tied && (role.pre_process || role.mtp_process));
}

void tie_embeddings_and_output_weights_state_dict(RankStateDict& dict, const StageRole& role, const std::string& output_layer_weight_key,
                                                  const std::string& first_stage_word_emb_key, Index data_rank) {
  const auto output = std::find_if(dict.tensors.begin(), dict.tensors.end(), [&](const auto& tensor) { return tensor.name == output_layer_weight_key; });
  if (role.post_process && role.pre_process) return;  // one module holds both
  if (!role.post_process || role.mtp_process) {
    require(output == dict.tensors.end(), Code::Mismatch, [&] { return fmt::format("{}: a stage that should not have it does", output_layer_weight_key); });
    return;
  }
  require(output != dict.tensors.end(), Code::Mismatch, [&] { return fmt::format("{}: the last stage lacks it", output_layer_weight_key); });
  output->key = first_stage_word_emb_key;
  output->replica_id = {1, 0, static_cast<int>(data_rank)};
  output->allow_shape_mismatch = true;
}

RankStateDict sharded_state_dict(const GptModel& model, const Parallel& parallel, const Pipeline& pipeline, const RankPlace& place, const std::string& prefix) {
  return Builder(model, parallel, pipeline, place, prefix).build();
}

}  // namespace shard
