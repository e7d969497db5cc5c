// Everything a forward pass must know about a decoder beside its weights, under Megatron's names. Values only.
#pragma once

#include "libshard/box.h"

#include <optional>
#include <string>
#include <vector>

namespace shard {

enum class Normalization { LayerNorm, RMSNorm };

enum class Activation {
  Silu,
  GeluErf,
  GeluTanh,
  Relu,
  SquaredRelu,
  QuickGelu,  ///< x·sigmoid(alpha·x)
};

/// How positions turn q and k: inverse frequencies for `dim` lanes of each head, and a factor on cos and sin.
struct RopeConfig {
  enum class Type { None, Default, Linear, Dynamic, Llama3, Yarn, LongRope };
  Type type = Type::None;
  Index dim = 0;                   ///< lanes that turn; the others pass
  double base = 10000;
  double factor = 1;
  double low_freq_factor = 1, high_freq_factor = 4;  ///< llama3
  double original_max_position = 8192;               ///< llama3, yarn, longrope
  double max_position = 0;                           ///< dynamic
  double beta_fast = 32, beta_slow = 1;              ///< yarn
  bool truncate = true;                              ///< yarn: whole lanes at the ramp's ends
  double concentration = 1;                          ///< multiplies cos and sin
  std::vector<double> short_factor, long_factor;     ///< longrope, one per pair of lanes
  bool interleaved = false;                          ///< lanes 2i and 2i+1 turn together, not i and i + dim/2
  bool operator==(const RopeConfig&) const = default;
};

struct RouterConfig {
  enum class Score { Softmax, Sigmoid, SqrtSoftplus };
  enum class GroupRule { Sum, Max };  ///< a group's score: the sum of its best `group_best`, or its maximum
  Score score = Score::Softmax;
  bool pre_softmax = false;         ///< softmax over all experts, then top-k; else over the k logits
  bool renormalize = false;         ///< divide the chosen weights by their sum (sigmoid, and softmax before top-k)
  Index topk = 2;
  Index num_groups = 0, group_topk = 0, group_best = 1;
  GroupRule group_rule = GroupRule::Sum;
  double scaling = 1;
  bool fp32 = false;                ///< logits computed in f32 whatever the model computes in
  bool operator==(const RouterConfig&) const = default;
};

/// What one decoder layer does differently from its neighbours.
struct LayerConfig {
  Index window = 0;                 ///< keys that a query sees, itself included; 0: all before it
  bool rope = true;
  bool local_rope = false;          ///< turns by `rope_local`
  bool moe = false;
  double softmax_scale = 1;
  bool operator==(const LayerConfig&) const = default;
};

struct TransformerConfig {
  std::string family;               ///< "llama", "gpt", "deepseek_v3" …: for people
  Index num_layers = 0, hidden_size = 0, ffn_hidden_size = 0;
  Index num_attention_heads = 0, num_query_groups = 0, kv_channels = 0;
  Index vocab_size = 0;             ///< true size; 0 where nothing says it
  Index max_position_embeddings = 0;

  Normalization normalization = Normalization::RMSNorm;
  double layernorm_epsilon = 1e-5;
  bool layernorm_zero_centered_gamma = false;
  bool qk_l2_norm = false;
  double latent_norm_epsilon = 1e-5;

  Activation activation = Activation::Silu;
  bool gated_linear_unit = true;
  double glu_linear_offset = 0;
  std::optional<double> activation_clamp;
  double activation_alpha = 1.702;

  RopeConfig rope, rope_local;
  std::vector<LayerConfig> layers;
  double attention_softcap = 0, logits_softcap = 0;  ///< 0: none
  double embedding_multiplier = 1;
  bool embedding_multiplier_rounded = false;         ///< to the weights' type first (Gemma)
  double logits_multiplier = 1;                      ///< MuP
  bool use_mup = false;                              ///< trained so: marks embeddings for the optimizer
  bool parallel_residual = false;
  bool residual_post_layernorm = false;              ///< the residual starts behind the norm
  bool off_by_one_softmax = false;                   ///< one more score of 0 in every row
  bool attention_output_gate = false;

  bool multi_latent_attention = false;
  Index q_lora_rank = 0, kv_lora_rank = 0, qk_head_dim = 0, qk_pos_emb_head_dim = 0, v_head_dim = 0;

  Index num_experts = 0;
  Index moe_ffn_hidden_size = 0, moe_shared_expert_size = 0;
  RouterConfig router;
  bool moe_probs_on_input = false;

  Index mtp_num_layers = 0;
  bool mtp_repeated_layer = false;
  double mtp_loss_scaling_factor = 0.1;              ///< of the mean over depths, beside the main loss
  bool tied = false;                                 ///< the output head is the embedding
  std::vector<std::string> notes;                    ///< choices that the source left open, for people

  /// The layer of an MTP depth (0-based): the kind of the last decoder layer, windows counted from the first again.
  LayerConfig mtp_layer(Index depth) const {
    auto out = layers.at(static_cast<std::size_t>(depth < num_layers ? depth : num_layers - 1));
    out.moe = layers.back().moe;
    return out;
  }
  bool operator==(const TransformerConfig&) const = default;
};

}  // namespace shard
