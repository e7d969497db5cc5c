// Each expert's rows gathered, fed forward, weighed and added to their tokens.
#include "lm/cpu/ops.h"

#include <algorithm>

namespace lm::cpu {
namespace {

void weigh_rows(const Context& on, Tensor& x, const std::vector<float>& weights) {
  for (Index r = 0; r < x.rows(); ++r)
    for (Index c = 0; c < x.columns(); ++c) x.row(r)[c] *= weights[static_cast<std::size_t>(r)];
  round_values(on, x.values());
}

Tensor product(const Context& on, const Packed& x, const Linear& by) {
  Tensor out(x.tokens(), by.weight.rows);
  linear(on, x, by, out);
  return out;
}

/// Megatron weighs an expert's rows before its second linear; that linear's bias is weighed as well.
Tensor weighed(const Context& on, const shard::TransformerConfig& config, const Tensor& x, const FeedForward& expert, const std::vector<float>& weights) {
  const Packed packed(on, x);
  auto up = product(on, packed, expert.up);
  const auto gate = expert.gate.weight ? product(on, packed, expert.gate) : Tensor();
  activate(on, config, expert.gate.weight ? &gate : nullptr, up);
  weigh_rows(on, up, weights);
  auto out = product(on, Packed(on, up), {expert.down.weight, {}, expert.down.scales});
  if (!expert.down.bias) return out;
  for (Index r = 0; r < out.rows(); ++r)
    for (Index c = 0; c < out.columns(); ++c) out.row(r)[c] += expert.down.bias.at(0, c) * weights[static_cast<std::size_t>(r)];
  round_values(on, out.values());
  return out;
}

}  // namespace

Tensor experts(const Context& on, const shard::TransformerConfig& config, const Tensor& x, const Routing& routing,
               const std::function<FeedForward(Index expert)>& weights) {
  Tensor out(x.rows(), config.hidden_size);
  std::fill(out.values().begin(), out.values().end(), 0.0f);
  for (Index e = 0; e < config.num_experts; ++e) {
    const auto expert = weights(e);
    std::vector<Index> rows;
    std::vector<float> of_rows;
    for (std::size_t i = 0; i < routing.expert.size(); ++i)
      if (routing.expert[i] == e) {
        rows.push_back(static_cast<Index>(i) / routing.topk);
        of_rows.push_back(routing.weight[i]);
      }
    if (rows.empty()) continue;
    Tensor chosen(static_cast<Index>(rows.size()), x.columns());
    for (std::size_t i = 0; i < rows.size(); ++i) std::copy(x.row(rows[i]), x.row(rows[i]) + x.columns(), chosen.row(static_cast<Index>(i)));
    if (config.moe_probs_on_input) {
      weigh_rows(on, chosen, of_rows);
      std::fill(of_rows.begin(), of_rows.end(), 1.0f);
    }
    const auto part = weighed(on, config, chosen, expert, of_rows);
    for (std::size_t i = 0; i < rows.size(); ++i) {
      auto* to = out.row(rows[i]);
      for (Index c = 0; c < out.columns(); ++c) to[c] += part.row(static_cast<Index>(i))[c];
      round_values(on, {to, static_cast<std::size_t>(out.columns())});
    }
  }
  return out;
}

}  // namespace lm::cpu
