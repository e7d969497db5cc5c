// Which experts a token goes to, and with what weight.
#include "lm/cpu/numbers.h"
#include "lm/cpu/ops.h"
#include "libshard/error.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace lm::cpu {
namespace {

using shard::RouterConfig;

void softmax(std::vector<float>& x) {
  const auto top = *std::max_element(x.begin(), x.end());
  float sum = 0;
  for (auto& value : x) sum += value = std::exp(value - top);
  for (auto& value : x) value /= sum;
}

/// Numbers of the k largest, larger first; of equal ones the first.
std::vector<Index> largest(const std::vector<float>& x, Index k) {
  std::vector<Index> order(x.size());
  std::iota(order.begin(), order.end(), Index{0});
  std::partial_sort(order.begin(), order.begin() + k, order.end(), [&](Index a, Index b) {
    const auto left = x[static_cast<std::size_t>(a)], right = x[static_cast<std::size_t>(b)];
    return left != right ? left > right : a < b;
  });
  order.resize(static_cast<std::size_t>(k));
  return order;
}

/// Experts outside the best groups can no longer be chosen.
void limit_groups(const RouterConfig& config, std::vector<float>& choice) {
  const auto size = static_cast<Index>(choice.size()) / config.num_groups;
  std::vector<float> score;
  for (Index g = 0; g < config.num_groups; ++g) {
    const std::vector<float> group(choice.begin() + g * size, choice.begin() + (g + 1) * size);
    const auto best = config.group_rule == RouterConfig::GroupRule::Max ? 1 : std::min(config.group_best, size);
    float sum = 0;
    for (const auto i : largest(group, best)) sum += group[static_cast<std::size_t>(i)];
    score.push_back(sum);
  }
  std::vector<bool> kept(static_cast<std::size_t>(config.num_groups), false);
  for (const auto g : largest(score, config.group_topk)) kept[static_cast<std::size_t>(g)] = true;
  for (std::size_t i = 0; i < choice.size(); ++i)
    if (!kept[i / static_cast<std::size_t>(size)]) choice[i] = -std::numeric_limits<float>::infinity();
}

}  // namespace

Routing route(const Context& on, const RouterConfig& config, const Tensor& logits, const Weight& bias) {
  const auto experts = logits.columns();
  shard::require(config.topk > 0 && config.topk <= experts, shard::Code::Mismatch,
                 [&] { return fmt::format("model: the router takes {} of {} experts", config.topk, experts); });
  const bool grouped = config.num_groups > 1 && config.group_topk > 0;
  shard::require(!grouped || (experts % config.num_groups == 0 && config.group_topk <= config.num_groups), shard::Code::Mismatch,
                 [&] { return fmt::format("model: {} experts in {} groups", experts, config.num_groups); });
  Routing out{config.topk, std::vector<Index>(static_cast<std::size_t>(logits.rows() * config.topk)), {}};
  out.weight.resize(out.expert.size());
  parallel_ranges(on, logits.rows(), 64, [&](Index lo, Index hi) {
    for (Index t = lo; t < hi; ++t) {
      std::vector<float> score(logits.row(t), logits.row(t) + experts);
      const bool soft = config.score == RouterConfig::Score::Softmax;
      if (soft && config.pre_softmax) softmax(score);
      if (config.score == RouterConfig::Score::Sigmoid)
        for (auto& value : score) value = 1.0f / (1.0f + std::exp(-value));
      if (config.score == RouterConfig::Score::SqrtSoftplus)
        for (auto& value : score) value = std::sqrt(value > 20 ? value : std::log1p(std::exp(value)));
      auto choice = score;
      if (bias)
        for (Index e = 0; e < experts; ++e) choice[static_cast<std::size_t>(e)] += bias.at(0, e);
      if (grouped) limit_groups(config, choice);
      const auto chosen = largest(choice, config.topk);
      std::vector<float> weight;
      for (const auto e : chosen) weight.push_back(score[static_cast<std::size_t>(e)]);
      if (soft && !config.pre_softmax) softmax(weight);
      if (config.renormalize && (soft || config.topk > 1)) {
        const auto sum = std::accumulate(weight.begin(), weight.end(), 0.0f) + (soft ? 0.0f : 1e-20f);
        for (auto& value : weight) value /= sum;
      }
      for (Index i = 0; i < config.topk; ++i) {
        auto value = weight[static_cast<std::size_t>(i)] * static_cast<float>(config.scaling);
        if (rounds_to_bf16(on.compute) && !config.fp32) value = cpu::round_bf16(value);
        out.expert[static_cast<std::size_t>(t * config.topk + i)] = chosen[static_cast<std::size_t>(i)];
        out.weight[static_cast<std::size_t>(t * config.topk + i)] = value;
      }
    }
  });
  return out;
}

}  // namespace lm::cpu
