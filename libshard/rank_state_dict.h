// What one rank's GPT model gives Megatron's checkpoint writer: every tensor and object with its key, place and copy number.
// Values only, from the family's table; holds no bytes.
#pragma once

#include "libshard/dtype.h"
#include "libshard/family.h"
#include "libshard/layout.h"

namespace shard {

/// Which modules Megatron builds layers from: it decides on module names, keys of norms, and what latent attention cuts.
enum class LayerSpec { Local, TransformerEngine };

/// A model as its transformer config and the checkpoint's metadata describe it.
struct GptModel {
  Params params;                       ///< of the family's table, complete; "vocab" is the padded vocabulary
  std::vector<bool> moe_layers;        ///< by layer; empty: all layers where there are experts
  DType dtype = DType::BF16;           ///< params_dtype
  LayerSpec spec = LayerSpec::Local;
  bool non_homogeneous_layers = false; ///< layers have keys of their own; else they are stacked on an axis
  bool singleton_local_shards = false; ///< so have experts, and the halves of a gated fc1
};

/// A rank as Megatron orders them with context parallel size 1; its expert coordinates follow from tensor and data.
struct RankPlace {
  Index pipeline = 0, chunk = 0, tensor = 0, data = 0;
};

/// Megatron's ShardedTensor (dist_checkpointing/mapping.py), field by field, but for the data.
struct LocalTensor {
  std::string name;                    ///< key in the state dict: the module's name on this rank
  std::string key;                     ///< in the checkpoint
  DType dtype = DType::BF16;
  Shape local_shape;                   ///< without the prepended axes
  Shape global_shape, global_offset, axis_fragmentations;
  Index prepend_axis_num = 0;
  ReplicaId replica_id{};
  bool allow_shape_mismatch = false;
};

/// Megatron's ShardedObject.
struct LocalObject {
  std::string name, key;
  Shape global_shape, global_offset;
  ReplicaId replica_id{};
};

/// ShardedTensorFactories are built: a gated fc1 is two tensors of one name.
struct RankStateDict {
  std::vector<LocalTensor> tensors;
  std::vector<LocalObject> objects;
};

/// Which ends of the model a virtual stage has, and whether it predicts further tokens.
struct StageRole {
  bool pre_process = true, post_process = true, mtp_process = false;
};
StageRole role_of(const Pipeline& pipeline, Chunk chunk, Index mtp_layers);

/// Whether the stage's output layer has rows of its own, tied or not.
bool owns_output_weight(const StageRole& role, bool tied);

/// The output layer of a last stage becomes one more copy of the embedding; other stages should have no such weight: throws
/// Mismatch where they do. Source: LanguageModule.tie_embeddings_and_output_weights_state_dict.
void tie_embeddings_and_output_weights_state_dict(RankStateDict& dict, const StageRole& role, const std::string& output_layer_weight_key,
                                                  const std::string& first_stage_word_emb_key, Index data_rank);

/// The whole of a rank's virtual stage. `parallel` gives the sizes, `pipeline` the layers. Throws BadLayout for ranks and cuts that
/// cannot be. One thing differs from Megatron: a last stage with tied weights and MTP behind the first one has no output weight,
/// where Megatron allocates one and then fails its own assertion. Source: GPTModel.sharded_state_dict.
RankStateDict sharded_state_dict(const GptModel& model, const Parallel& parallel, const Pipeline& pipeline, const RankPlace& place,
                                 const std::string& prefix = "");

}  // namespace shard
