// Bounds are generous; what matters is that no index can leave its tensor.
#include "lm/check_config.h"

#include "libshard/error.h"

#include <algorithm>
#include <cmath>

namespace lm {

void check_config(const shard::TransformerConfig& config) {
  using shard::Index;
  constexpr Index kMost = Index{1} << 32, kMostLanes = 1 << 16;  // tables of angles are made before weights are seen
  const auto within = [](const char* name, Index value, Index low, Index high) {
    shard::require(value >= low && value <= high, shard::Code::Mismatch, [&] { return fmt::format("model: {} is {}; should be {} to {}", name, value, low, high); });
  };
  const auto number = [](const char* name, double value, bool positive) {
    shard::require(std::isfinite(value) && (!positive || value > 0), shard::Code::Mismatch, [&] { return fmt::format("model: {} is {}; should be a {}number", name, value, positive ? "positive " : ""); });
  };
  within("num_layers", config.num_layers, 1, 100'000);
  within("number of described layers", static_cast<Index>(config.layers.size()), config.num_layers, config.num_layers);
  within("hidden_size", config.hidden_size, 1, kMost);
  within("num_attention_heads", config.num_attention_heads, 1, 1 << 20);
  within("num_query_groups", config.num_query_groups, 1, config.num_attention_heads);
  shard::require(config.num_attention_heads % config.num_query_groups == 0, shard::Code::Mismatch,
                 [&] { return fmt::format("model: {} heads in {} groups", config.num_attention_heads, config.num_query_groups); });
  within("kv_channels", config.kv_channels, 1, kMostLanes);
  within("num_experts", config.num_experts, 0, 1 << 20);
  within("mtp_num_layers", config.mtp_num_layers, 0, 1000);
  auto lanes = config.kv_channels;
  if (config.multi_latent_attention) {
    within("q_lora_rank", config.q_lora_rank, 0, kMost);
    within("kv_lora_rank", config.kv_lora_rank, 1, kMost);
    within("qk_head_dim", config.qk_head_dim, 0, kMostLanes);
    within("qk_pos_emb_head_dim", config.qk_pos_emb_head_dim, 0, kMostLanes);
    within("v_head_dim", config.v_head_dim, 1, kMostLanes);
    lanes = config.qk_pos_emb_head_dim;
  }
  for (const auto* rope : {&config.rope, &config.rope_local}) {
    if (rope->type == shard::RopeConfig::Type::None) continue;
    within("rotated lanes", rope->dim + rope->dim % 2, 0, lanes);
    number("rotary base", rope->base, true);
    number("rotary factor", rope->factor, true);
    number("rotary concentration", rope->concentration, false);
  }
  if (config.num_experts) {
    within("moe_router_topk", config.router.topk, 1, config.num_experts);
    within("router groups", config.router.num_groups, 0, config.num_experts);
    within("chosen router groups", config.router.group_topk, 0, std::max<Index>(config.router.num_groups, 0));
  }
  number("layernorm_epsilon", config.layernorm_epsilon, false);
  for (const auto& layer : config.layers) {
    within("attention window", layer.window, 0, kMost);
    number("softmax scale", layer.softmax_scale, false);
    shard::require(!layer.moe || config.num_experts > 0, shard::Code::Mismatch, [] { return "model: a layer of experts without experts"; });
  }
}

}  // namespace lm
