// Megatron's LanguageModule on one rank: which parts of the model live here, what they compute, what they are called when saved.
// Member names are Megatron's; activations are [batch·length, hidden], a sequence after another.
#pragma once

#include "libshard/rank_state_dict.h"
#include "lm/transformer_layer.h"

#include <functional>
#include <optional>
#include <string>
#include <vector>

namespace lm {

/// A rank's place in a pipeline without virtual stages, and the ranks that share embeddings.
struct Placement {
  int pipeline_rank = 0, pipeline_size = 1;
  Index first_layer = 0, layers = 0;          ///< decoder layers here
  bool pre_process = true, post_process = true, mtp_process = false;
};
/// Layers cut evenly; everything behind the last layer, MTP included, on the last stage. Throws BadLayout for more stages than layers.
Placement placement_of(const shard::TransformerConfig& config, int pipeline_rank, int pipeline_size);

/// All stages of that placement.
shard::Pipeline pipeline_of(const shard::TransformerConfig& config, int pipeline_size);

/// Pipeline ranks that hold a copy of the embedding or the head: the first; the last where tied or where MTP embeds tokens.
std::vector<int> embedding_ranks(const shard::TransformerConfig& config, int pipeline_size);

/// What one batch feeds the model: all [batch·length].
struct Batch {
  Index batch = 0, length = 0;
  std::vector<Index> input_ids, labels, position_ids;
};

/// The inputs of one compute_mtp_single_step call.
struct MtpStep {
  Index depth = 0;
  Tensor in_hidden;                            ///< [N, hidden]
  std::vector<Index> next_token_ids, position_ids;
};

/// A block of logits: whose (−1: the decoder; k: MTP depth k; steps by number), and the first vocabulary column.
struct LogitsBlock {
  enum class Of { Main, Mtp, Step } of = Of::Main;
  Index index = 0, first_column = 0;
  const Tensor& values;
};

struct HiddenStats : TensorStats {
  std::string name;                            ///< "embedding", "layer 3", "final_norm", "mtp 0"
};

/// What a whole forward pass leaves; filled by the rank that holds the last stage (statistics by every stage).
struct ForwardResult {
  struct Losses {
    std::vector<float> all, limited, reference;  ///< over the stored, the true and the reference's vocabulary
  };
  Losses main;
  std::vector<Losses> mtp;
  std::vector<std::vector<Index>> mtp_labels;
  std::vector<Tensor> step_hidden;
  double peak_logit = 0;                       ///< over the true vocabulary
  std::uint64_t nonfinite_logits = 0;
  std::vector<HiddenStats> hidden;
};

struct ForwardRequest {
  const Batch& batch;
  const std::vector<MtpStep>& steps;
  Index true_vocab = 0, reference_vocab = 0;   ///< columns that the second and third loss run over
  std::function<void(const LogitsBlock&)> on_logits;
  bool mtp = true;
};

/// A parameter that Megatron's optimizers treat apart, under its name in the module.
struct ParameterMarks {
  std::string name;
  bool is_embedding_or_output_parameter = false;
  bool is_embedding_parameter = false;  ///< MuP: learning rate not scaled by width
  bool shared_embedding = false;        ///< one of several stages' copies
  bool shared = false;                  ///< of those, not the first
  bool zero_out_wgrad = false;          ///< one stage multiplies by it twice
  bool operator==(const ParameterMarks&) const = default;
};

class LanguageModule {
 public:
  /// `source` must hold what the configuration calls for; throws Mismatch naming what is missing or left over.
  LanguageModule(const shard::TransformerConfig& config, WeightSource& source, Placement placement, Comm& tensor, Comm& pipeline, Ops& on);

  /// The weights that each rank of this stage takes, in order, for a request like this one.
  std::vector<WeightUse> weight_uses(Index steps, bool mtp) const;

  /// The tables that it gathers rows of.
  std::vector<std::string> gathered_weights() const;

  /// labels [n], logits of this rank's columns from `first`: the loss of every row, unmasked, over columns [0, limit) of all ranks.
  /// Smoothing takes its mean over this rank's columns alone, as Megatron does: each rank's loss is then its own.
  std::vector<float> compute_language_model_loss(const std::vector<Index>& labels, const Tensor& logits, Index first, Index limit, double label_smoothing = 0);
  /// Logits of MuP models are scaled, Gemma's are capped.
  void scale_logits(Tensor& logits) const;
  /// The tensor whose rows embed tokens here, or that the head multiplies by; nullopt on stages with neither.
  std::optional<std::string> shared_embedding_or_output_weight() const;
  /// Whether this rank takes part in keeping the copies of a shared embedding equal.
  bool is_in_embd_group() const;
  /// Copies of the shared weight on several stages must be equal: compares the stages' fingerprints of it (shape and 64 rows).
  /// Collective over the pipeline; throws Mismatch, on every rank, where a stage of the embedding group sees another weight.
  void setup_embeddings_and_output_layer();
  /// What Megatron's setup_embeddings_and_output_layer() marks on this stage: embedding first, then head.
  std::vector<ParameterMarks> embedding_and_output_marks() const;
  /// One MTP step: the new hidden state [N, hidden]; its logits come with the head's blocks. Rows see the rows before them.
  Tensor compute_mtp_single_step(Weights& weights, const MtpStep& step);
  /// What this rank would save: all of its stage, the first of its copies along data ranks.
  shard::RankStateDict sharded_state_dict(const std::string& prefix, shard::LayerSpec spec = shard::LayerSpec::Local) const;
  /// Makes this stage's output layer, where it is the embedding's copy, one; sharded_state_dict has done so.
  void tie_embeddings_and_output_weights_state_dict(shard::RankStateDict& dict, const std::string& output_layer_weight_key,
                                                    const std::string& first_stage_word_emb_key) const;

  /// The whole pass; collective over all ranks of the model.
  void forward(Weights& weights, const ForwardRequest& request, ForwardResult& result, std::mutex& result_mutex);

 private:
  struct Noted {
    std::string name;
    std::function<TensorStats()> stats;
  };
  Tensor embed(Weights& weights, const Ids& ids, const Ids& positions);
  /// MTP layer `depth`: the new hidden state.
  Tensor mtp_layer(Weights& weights, Index depth, const Ids& ids, const Ids& positions, const Rope& rope, Index length, const Tensor& hidden);
  void head(Weights& weights, const ForwardRequest& request, const std::vector<Tensor>& hidden, ForwardResult& result, std::mutex& mutex);
  void note(const std::string& name, const Tensor& hidden, std::vector<Noted>& notes) const;
  std::vector<std::pair<Index, Index>> head_blocks() const;
  Share vocabulary_share() const;
  std::string head_name() const;
  RankContext rank(Weights& weights) const { return {config_, weights, on_, tensor_}; }

  const shard::TransformerConfig& config_;
  WeightSource& source_;
  Placement placement_;
  Comm &tensor_, &pipeline_;
  Ops& on_;
  Index vocab_ = 0;  ///< stored rows
};

/// Throws Mismatch where the checkpoint holds a weight that no part of the model uses.
void refuse_unused(const shard::ShardedStateDict& dict, const std::vector<WeightUse>& used);

/// Rows of `length` rolled left by one; the freed last slot is 0.
std::vector<Index> roll_left(const std::vector<Index>& values, Index length);

}  // namespace lm
