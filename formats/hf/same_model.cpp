// What is compared is what either of the two readers (hf_config.cpp, megatron/model_config.cpp) may find.
#include "formats/hf/same_model.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

namespace formats::hf {
namespace {

using shard::RopeConfig;
using shard::RouterConfig;
using shard::TransformerConfig;

constexpr const char* kActivations[] = {"silu", "gelu", "gelu (tanh)", "relu", "relu2", "quick_gelu"};
constexpr const char* kRopes[] = {"none", "default", "linear", "dynamic", "llama3", "yarn", "longrope"};
constexpr const char* kScores[] = {"softmax", "sigmoid", "sqrtsoftplus"};

template <typename Enum, std::size_t N>
std::string named(const char* const (&names)[N], Enum value) { return names[static_cast<std::size_t>(value)]; }

class Comparison {
 public:
  void text(const char* what, const std::string& a, const std::string& b) {
    if (a != b) out.push_back({what, {}, a, b});
  }
  void flag(const char* what, bool a, bool b) { text(what, a ? "yes" : "no", b ? "yes" : "no"); }
  void number(const char* what, double a, double b) {
    if (std::abs(a - b) > 1e-6 * std::max(std::abs(a), std::abs(b))) out.push_back({what, {}, fmt::format("{}", a), fmt::format("{}", b)});
  }

  void rope(const RopeConfig& a, const RopeConfig& b) {
    text("rope scaling", named(kRopes, a.type), named(kRopes, b.type));
    if (a.type != b.type || a.type == RopeConfig::Type::None) return;
    number("rope base", a.base, b.base);
    number("lanes that turn", static_cast<double>(a.dim), static_cast<double>(b.dim));
    flag("rotation of lanes side by side", a.interleaved, b.interleaved);
    if (a.type == RopeConfig::Type::Default) return;
    number("rope factor", a.factor, b.factor);
    if (a.type == RopeConfig::Type::Llama3) {
      number("rope constants", a.low_freq_factor, b.low_freq_factor);
      number("rope constants", a.high_freq_factor, b.high_freq_factor);
    }
    if (a.type == RopeConfig::Type::Llama3 || a.type == RopeConfig::Type::Yarn) number("rope constants", a.original_max_position, b.original_max_position);
    if (a.type != RopeConfig::Type::Yarn) return;
    number("rope constants", a.beta_fast, b.beta_fast);
    number("rope constants", a.beta_slow, b.beta_slow);
    flag("rope constants", a.truncate, b.truncate);
    number("rope concentration", a.concentration, b.concentration);
  }

  void router(const RouterConfig& a, const RouterConfig& b) {
    text("router score", named(kScores, a.score), named(kScores, b.score));
    number("experts chosen", static_cast<double>(a.topk), static_cast<double>(b.topk));
    if (a.score == RouterConfig::Score::Softmax) flag("softmax over all experts", a.pre_softmax, b.pre_softmax);
    else flag("renormalised expert weights", a.renormalize, b.renormalize);
    number("expert weights' factor", a.scaling, b.scaling);
    const auto groups = [](const RouterConfig& r) { return r.num_groups > 1 && r.group_topk > 0 ? static_cast<double>(r.num_groups) : 1.0; };
    number("expert groups", groups(a), groups(b));
    if (groups(a) == 1 || groups(b) == 1) return;
    const auto best = [](const RouterConfig& r) { return r.group_rule == RouterConfig::GroupRule::Max ? 1.0 : static_cast<double>(r.group_best); };
    number("expert groups chosen", static_cast<double>(a.group_topk), static_cast<double>(b.group_topk));
    number("score of expert groups", best(a), best(b));
  }

  std::vector<Difference> out;
};

constexpr std::pair<const char*, const char*> kWarnings[] = {{"embedding multiplier sqrt(hidden_size)", "embedding multiplier (mup_embedding_mult)"}, {"gated tanh GELU", "activation"},
                                                             {"query_pre_attn_scalar", "softmax scale"}, {"attention and logit soft caps", "attention's soft cap"},
                                                             {"attention and logit soft caps", "logits' soft cap"}, {"parallel residual", "parallel residual"}};

}  // namespace

std::set<std::string> parts_of_warnings(const std::vector<std::string>& warnings) {
  std::set<std::string> out;
  for (const auto& [warning, part] : kWarnings)
    if (std::find(warnings.begin(), warnings.end(), warning) != warnings.end()) out.insert(part);
  return out;
}

std::vector<Difference> differences(const TransformerConfig& a, const TransformerConfig& b) {
  Comparison compare;
  const auto norm = [](const TransformerConfig& c) { return c.normalization == shard::Normalization::RMSNorm ? "RMSNorm" : "LayerNorm"; };
  compare.text("normalization", norm(a), norm(b));
  compare.number("norm epsilon", a.layernorm_epsilon, b.layernorm_epsilon);
  compare.flag("norms around 1", a.layernorm_zero_centered_gamma, b.layernorm_zero_centered_gamma);
  compare.flag("L2 norm of q and k", a.qk_l2_norm, b.qk_l2_norm);
  compare.text("activation", named(kActivations, a.activation), named(kActivations, b.activation));
  compare.flag("gate", a.gated_linear_unit, b.gated_linear_unit);
  if (a.activation == shard::Activation::QuickGelu) compare.number("activation's factor", a.activation_alpha, b.activation_alpha);
  compare.number("gate's offset", a.glu_linear_offset, b.glu_linear_offset);
  compare.number("activation's clamp", a.activation_clamp.value_or(0), b.activation_clamp.value_or(0));
  compare.rope(a.rope, b.rope);
  compare.flag("parallel residual", a.parallel_residual, b.parallel_residual);
  compare.flag("residual behind the norm", a.residual_post_layernorm, b.residual_post_layernorm);
  compare.flag("softmax off by one", a.off_by_one_softmax, b.off_by_one_softmax);
  compare.number("attention's soft cap", a.attention_softcap, b.attention_softcap);
  compare.number("logits' soft cap", a.logits_softcap, b.logits_softcap);
  compare.number("embedding multiplier (mup_embedding_mult)", a.embedding_multiplier, b.embedding_multiplier);
  compare.number("logits multiplier (mup_output_mult)", a.logits_multiplier, b.logits_multiplier);
  if (a.num_experts > 0 && b.num_experts > 0) compare.router(a.router, b.router);
  for (std::size_t i = 0; i < std::min(a.layers.size(), b.layers.size()); ++i) {
    const auto before = compare.out.size();
    const auto &x = a.layers[i], &y = b.layers[i];
    compare.number("window", static_cast<double>(x.window), static_cast<double>(y.window));
    if (a.rope.type == b.rope.type) compare.flag("rope", x.rope, y.rope);
    compare.flag("experts", x.moe, y.moe);
    compare.number("softmax scale", x.softmax_scale, y.softmax_scale);
    for (auto at = before; at < compare.out.size(); ++at) compare.out[at].where = fmt::format("layer {}'s ", i);
    if (compare.out.size() > before) break;  // the first layer tells enough
  }
  return std::move(compare.out);
}

}  // namespace formats::hf
