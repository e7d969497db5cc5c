// A switch is on where any layer has the weight that it stands for.
#include "lm/saved_model.h"

#include "libshard/error.h"
#include "libshard/families/megatron.h"

#include <algorithm>

namespace lm {

shard::GptModel saved_model(const shard::TransformerConfig& config, const WeightSource& source) {
  shard::GptModel out;
  out.dtype = source.dtype("embedding.word.weight");
  for (const auto& layer : config.layers) out.moe_layers.push_back(layer.moe);
  const bool mixed = std::adjacent_find(out.moe_layers.begin(), out.moe_layers.end(), std::not_equal_to<>()) != out.moe_layers.end();
  out.non_homogeneous_layers = mixed;
  const auto any = [&](const std::string& name) -> Index {
    for (Index l = 0; l < config.num_layers; ++l)
      if (source.has(fmt::format("layers.{}.{}", l, name))) return 1;
    return 0;
  };
  auto& params = out.params;
  params = {{"layers", config.num_layers}, {"hidden", config.hidden_size}, {"ffn", config.ffn_hidden_size}, {"heads", config.num_attention_heads},
            {"head", config.kv_channels}, {"vocab", source.shape("embedding.word.weight").at(0)}, {"tied", config.tied}, {"gated", config.gated_linear_unit},
            {"layernorm", config.normalization == shard::Normalization::LayerNorm}, {"qkv_bias", any("attention.q.bias")},
            {"mlp_bias", any("attention.out.bias")}, {"sinks", any("attention.sinks")}, {"post_norms", any("attention.post_norm.weight")}};
  if (config.mtp_num_layers > 0) params["mtp"] = config.mtp_repeated_layer ? 1 : config.mtp_num_layers;
  if (source.has("embedding.position.weight")) {
    params["learned_positions"] = 1;
    params["positions"] = source.shape("embedding.position.weight").at(0);
  }
  if (config.multi_latent_attention) {
    params["mla"] = 1;
    params["qk_norm"] = any("attention.kv_norm.weight");
    params["q_lora"] = config.q_lora_rank;
    params["kv_lora"] = config.kv_lora_rank;
    params["nope"] = config.qk_head_dim;
    params["rope_dim"] = config.qk_pos_emb_head_dim;
    params["value_head"] = config.v_head_dim;
  } else {
    params["groups"] = config.num_query_groups;
    params["qk_norm"] = any("attention.q_norm.weight");
  }
  if (config.num_experts > 0) {
    params["experts"] = config.num_experts;
    params["expert_ffn"] = config.moe_ffn_hidden_size;
    params["shared_ffn"] = config.moe_shared_expert_size;
    params["shared_gate"] = any("mlp.shared.gate_weight");
    params["expert_bias"] = any("mlp.router.expert_bias");
    params["router_bias"] = any("mlp.router.bias");
  }
  shard::complete(params);
  return out;
}

}  // namespace lm
