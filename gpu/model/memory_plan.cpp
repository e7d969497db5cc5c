// Counts the tensors that live at one time in the widest part of a pass; blocks that are kept for reuse, rounded up, make it half as much again.
#include "gpu/model/memory_plan.h"

#include "gpu/libs/cublaslt.h"
#include "libshard/error.h"

#include <algorithm>

namespace gpu {
namespace {

std::string text_of(std::uint64_t bytes) {
  const auto mega = static_cast<double>(bytes) / 1e6;
  return mega < 1000 ? fmt::format("{:.1f} MB", mega) : fmt::format("{:.2f} GB", mega / 1000);
}

}  // namespace

std::uint64_t activation_bytes(const shard::TransformerConfig& config, const lm::Ranks& ranks, lm::Index rows) {
  const std::uint64_t item = lm::rounds_to_bf16(ranks.compute) ? 2 : 4, wide = 4;
  const auto count = [](lm::Index n) { return static_cast<std::uint64_t>(std::max<lm::Index>(n, 0)); };
  const auto per_rank = [&](lm::Index n) { return (count(n) + static_cast<std::uint64_t>(ranks.tensor) - 1) / static_cast<std::uint64_t>(ranks.tensor); };
  const auto hidden = count(config.hidden_size);
  const auto head = count(config.multi_latent_attention ? config.qk_head_dim + config.qk_pos_emb_head_dim + config.v_head_dim : config.kv_channels);
  const auto attention = per_rank(config.num_attention_heads) * head * (config.multi_latent_attention ? 4 : 2) + per_rank(config.num_query_groups) * head * 2 +
                         count(config.q_lora_rank) + 2 * count(config.kv_lora_rank);
  const auto dense = 2 * per_rank(config.ffn_hidden_size ? config.ffn_hidden_size : 4 * config.hidden_size);
  const auto topk = count(config.router.topk);
  const auto experts = config.num_experts ? topk * (2 * hidden + 2 * per_rank(config.moe_ffn_hidden_size ? config.moe_ffn_hidden_size : config.ffn_hidden_size)) + 2 * count(config.num_experts) * wide / item +
                                                2 * per_rank(config.moe_shared_expert_size)
                                          : 0;
  // The states that wait for the head, the residual, a norm, a branch; then the widest branch; then a block of logits and what is said of it.
  const auto states = (6 + 2 * count(config.mtp_num_layers)) * hidden;
  constexpr std::uint64_t kHeadBlock = 32 << 20;
  const auto logits = std::max<std::uint64_t>(48, kHeadBlock / (2 * std::max<std::uint64_t>(hidden, 1)));
  // In fp8 a linear's input lies there in bytes as well, with its scales.
  const auto scaled = ranks.compute == lm::Compute::Fp8 ? std::max({hidden, attention, dense, experts}) / 32 * 33 + 64 : 0;
  const auto row = item * (states + std::max({attention, dense, experts, 2 * logits})) + scaled + 4 * hidden * wide + 64;
  // In f32 a weight that is stored as bf16 is widened for its product.
  const auto widened = ranks.compute == lm::Compute::F32 ? wide * hidden * std::max(dense, attention) : 0;
  return (count(rows) * row + widened) * 3 / 2 + (std::uint64_t{64} << 20);
}

void require_fits(const Demand& demand, std::uint64_t available, const std::string& device, const lm::Ranks& ranks) {
  if (demand.all() <= available) return;
  std::string fits;
  if (demand.weights + demand.libraries + demand.least_activations <= available) fits = "fewer tokens at a time would fit";
  else if (ranks.compute == lm::Compute::F32 && (demand.weights + demand.activations) / 2 + demand.libraries <= available) fits = "--compute bf16 may fit";
  else fits = "--pp over several such devices, or --device cpu, would fit";
  shard::fail(shard::Code::Device, "{}: the model takes {} of weights, {} of activations and {} for libraries; {} are available, {} too little; {}", device, text_of(demand.weights),
              text_of(demand.activations), text_of(demand.libraries), text_of(available), text_of(demand.all() - available), fits);
}

}  // namespace gpu
