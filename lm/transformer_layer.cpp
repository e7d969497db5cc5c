// Attention, latent attention, dense and expert feed-forward, in Megatron's order of operations.
#include "lm/transformer_layer.h"

#include "libshard/error.h"

#include <array>

namespace lm {
namespace {

using shard::Code;
using shard::TransformerConfig;

class Layer {
 public:
  Layer(RankContext& rank, const shard::LayerConfig& layer, const std::string& prefix, const Rope& rope, Index length)
      : rank_(rank), config_(rank.config), on_(rank.on), layer_(layer), prefix_(prefix), rope_(rope), length_(length) {}

  Tensor run(Tensor& hidden) {
    auto normed = norm("attention.norm", hidden);
    auto attended = config_.multi_latent_attention ? latent_attention(normed) : attention(normed);
    if (has("attention.post_norm.weight")) attended = norm("attention.post_norm", attended);
    if (config_.parallel_residual) {
      // Both branches start from the same residual; NeoX adds them to each other first.
      auto fed = feed_forward(norm("mlp.norm", hidden));
      on_.add(fed, attended);
      return fed;
    }
    if (config_.residual_post_layernorm) hidden = std::move(normed);
    auto between = on_.add_normalize(hidden, attended, norm_of(config_.layernorm_epsilon), parameters("mlp.norm"));
    auto fed = feed_forward(between);
    if (has("mlp.post_norm.weight")) fed = norm("mlp.post_norm", fed);
    if (config_.residual_post_layernorm) hidden = std::move(between);
    return fed;
  }

 private:
  bool has(const std::string& name) const { return rank_.weights.has(prefix_ + name); }
  Weight take(const std::string& name) { return rank_.weights.take(prefix_ + name); }
  Weight take_if(const std::string& name) { return has(name) ? take(name) : Weight{}; }
  Linear parameters(const std::string& name) {
    auto weight = take(name + ".weight");
    return {std::move(weight), take_if(name + ".bias"), take_if(name + ".weight_scale")};
  }
  void expect(const Linear& p, const std::string& name, Index rows, Index columns) const {
    shard::require(p.weight.rows == rows && p.weight.columns == columns, Code::Mismatch, [&] {
      return fmt::format("{}{}.weight: is [{}, {}]; the model's configuration makes it [{}, {}]", prefix_, name, p.weight.rows, p.weight.columns, rows, columns);
    });
    shard::require(!p.bias || p.bias.columns == rows, Code::Mismatch, [&] { return fmt::format("{}{}.bias: has {} numbers for {} rows", prefix_, name, p.bias.columns, rows); });
  }
  Norm norm_of(double epsilon) const { return {config_.normalization, epsilon, config_.layernorm_zero_centered_gamma}; }
  Tensor norm(const std::string& name, const Tensor& x) {
    return on_.normalize(x, norm_of(config_.layernorm_epsilon), parameters(name));
  }

  Tensor linear(const Packed& x, const Linear& by) {
    auto out = on_.make(x.tokens, by.weight.rows);
    on_.linear(x, by, out);
    return out;
  }
  /// Several linears of one input, each into a tensor of its own.
  template <std::size_t N>
  std::array<Tensor, N> linears(const Packed& x, const std::array<Linear, N>& by) {
    std::array<Tensor, N> out;
    std::vector<LinearInto> all;
    for (std::size_t i = 0; i < N; ++i) {
      out[i] = on_.make(x.tokens, by[i].weight.rows);
      all.push_back({by[i], out[i]});
    }
    on_.linears(x, all);
    return out;
  }
  /// The sum over ranks, each of which has some of the inputs.
  Tensor row_parallel(const Tensor& x, const Linear& p) {
    auto out = linear(on_.pack(x), p);
    reduce(out);
    return out;
  }
  void reduce(Tensor& x) {
    if (rank_.tensor.size() == 1) return;
    rank_.tensor.all_reduce_sum(x);
    on_.round(x);
  }

  Tensor attention(const Tensor& x) {
    const auto heads = config_.num_attention_heads, size = config_.kv_channels, ratio = heads / config_.num_query_groups;
    const auto mine = share_of(heads, rank_.tensor.rank(), rank_.tensor.size());
    const auto [group, groups] = groups_of(mine, ratio);
    const auto wq = parameters("attention.q"), wk = parameters("attention.k"), wv = parameters("attention.v");
    expect(wq, "attention.q", mine.count * size, config_.hidden_size);
    expect(wk, "attention.k", groups * size, config_.hidden_size);
    expect(wv, "attention.v", groups * size, config_.hidden_size);
    auto [q, k, v] = linears<3>(on_.pack(x), {wq, wk, wv});
    head_norm("attention.q_norm", q, mine.count, size);
    head_norm("attention.k_norm", k, groups, size);
    if (layer_.rope) {
      on_.apply_rope(rope_, q, 0, mine.count, size, length_);
      on_.apply_rope(rope_, k, 0, groups, size, length_);
    }
    AttentionShape shape{x.rows() / length_, length_, mine.count, ratio, mine.lo - group * ratio, size, size, layer_.softmax_scale,
                         config_.attention_softcap, layer_.window, config_.off_by_one_softmax};
    const auto values = on_.attention(shape, q, k, v, take_if("attention.sinks"));
    const auto out = parameters("attention.out");
    expect(out, "attention.out", config_.hidden_size, mine.count * size);
    return row_parallel(values, out);
  }

  /// Over each head's lanes.
  void head_norm(const std::string& name, Tensor& x, Index heads, Index size) {
    if (!has(name + ".weight")) {
      if (config_.qk_l2_norm) on_.normalize_pieces(x, heads, size, {shard::Normalization::RMSNorm, config_.layernorm_epsilon, false}, {});
      return;
    }
    const auto p = parameters(name);
    shard::require(p.weight.columns == size, Code::Mismatch, [&] { return fmt::format("{}{}.weight: has {} numbers; a head has {}", prefix_, name, p.weight.columns, size); });
    on_.normalize_pieces(x, heads, size, norm_of(config_.layernorm_epsilon), p);
  }

  void latent_norm(const std::string& name, Tensor& x, Index width) {
    if (has(name + ".weight")) on_.normalize_pieces(x, 1, width, norm_of(config_.latent_norm_epsilon), parameters(name));
  }

  Tensor latent_attention(const Tensor& x) {
    const auto heads = config_.num_attention_heads, nope = config_.qk_head_dim, turned = config_.qk_pos_emb_head_dim, width = nope + turned,
               value = config_.v_head_dim, latent = config_.kv_lora_rank;
    const auto mine = share_of(heads, rank_.tensor.rank(), rank_.tensor.size());
    const auto first = config_.q_lora_rank ? "attention.q_down" : "attention.q";
    const auto from = parameters(first), down = parameters("attention.kv_down");
    expect(from, first, config_.q_lora_rank ? config_.q_lora_rank : mine.count * width, config_.hidden_size);
    expect(down, "attention.kv_down", latent + turned, config_.hidden_size);
    auto [q, compressed] = linears<2>(on_.pack(x), {from, down});
    if (config_.q_lora_rank) {
      latent_norm("attention.q_norm", q, config_.q_lora_rank);
      const auto up = parameters("attention.q_up");
      expect(up, "attention.q_up", mine.count * width, config_.q_lora_rank);
      q = linear(on_.pack(q), up);
    }
    latent_norm("attention.kv_norm", compressed, latent);
    const auto up = parameters("attention.kv_up");
    expect(up, "attention.kv_up", mine.count * (nope + value), latent);
    auto small = on_.make(x.rows(), latent);
    on_.copy_pieces(compressed, 0, 0, small, 0, 0, 1, latent);
    const auto kv = linear(on_.pack(small), up);
    if (layer_.rope) {
      on_.apply_rope(rope_, q, nope, mine.count, width, length_);
      on_.apply_rope(rope_, compressed, latent, 1, turned, length_);
    }
    auto k = on_.make(x.rows(), mine.count * width), v = on_.make(x.rows(), mine.count * value);
    on_.copy_pieces(kv, 0, nope + value, k, 0, width, mine.count, nope);
    on_.copy_pieces(compressed, latent, 0, k, nope, width, mine.count, turned);
    on_.copy_pieces(kv, nope, nope + value, v, 0, value, mine.count, value);
    AttentionShape shape{x.rows() / length_, length_, mine.count, 1, 0, width, value, layer_.softmax_scale, config_.attention_softcap, layer_.window,
                         config_.off_by_one_softmax};
    const auto values = on_.attention(shape, q, k, v, {});
    const auto out = parameters("attention.out");
    expect(out, "attention.out", config_.hidden_size, mine.count * value);
    return row_parallel(values, out);
  }

  Tensor feed_forward(const Tensor& x) { return layer_.moe ? mixture(x) : dense(x, "mlp."); }

  /// This rank's part of a feed-forward's weights.
  FeedForward feed_forward_of(const std::string& name) {
    Linear gate;
    if (config_.gated_linear_unit) gate = parameters(name + "gate");
    const auto up = parameters(name + "up");
    const auto width = up.weight.rows;
    expect(up, name + "up", width, config_.hidden_size);
    if (config_.gated_linear_unit) expect(gate, name + "gate", width, config_.hidden_size);
    const auto down = parameters(name + "down");
    expect(down, name + "down", config_.hidden_size, width);
    return {gate, up, down};
  }

  /// The partial sum: the caller reduces.
  Tensor partial_mlp(const Packed& x, const FeedForward& by) {
    if (!by.gate.weight) {
      auto up = linear(x, by.up);
      on_.activate(config_, nullptr, up);
      return linear(on_.pack(up), by.down);
    }
    auto [gate, up] = linears<2>(x, {by.gate, by.up});
    on_.activate(config_, &gate, up);
    return linear(on_.pack(up), by.down);
  }

  Tensor dense(const Tensor& x, const std::string& name) {
    auto out = partial_mlp(on_.pack(x), feed_forward_of(name));
    reduce(out);
    return out;
  }

  Tensor mixture(const Tensor& x) {
    const auto router = parameters("mlp.router");
    expect(router, "mlp.router", config_.num_experts, config_.hidden_size);
    const auto logits = config_.router.fp32 ? on_.linear_f32(x, router) : linear(on_.pack(x), router);
    const auto routing = on_.route(config_.router, logits, take_if("mlp.router.expert_bias"));
    auto out = on_.experts(config_, x, routing, [&](Index e) { return feed_forward_of(fmt::format("mlp.experts.{}.", e)); });
    if (has("mlp.shared.up.weight")) {
      const auto packed = on_.pack(x);
      auto shared = partial_mlp(packed, feed_forward_of("mlp.shared."));
      if (has("mlp.shared.gate_weight")) on_.gate_rows(shared, linear(packed, {take("mlp.shared.gate_weight"), {}}));
      on_.add(out, shared);
    }
    reduce(out);
    return out;
  }

  RankContext& rank_;
  const TransformerConfig& config_;
  Ops& on_;
  const shard::LayerConfig& layer_;
  std::string prefix_;
  const Rope& rope_;
  Index length_;
};

}  // namespace

std::vector<WeightUse> layer_uses(const WeightSource& source, const TransformerConfig& config, const shard::LayerConfig& layer,
                                  const std::string& prefix, int times) {
  std::vector<WeightUse> out;
  const auto use = [&](const std::string& name) {
    for (const auto* part : {".weight", ".weight_scale", ".bias"})
      if (source.has(prefix + name + part)) out.push_back({prefix + name + part, 0, -1, times});
  };
  const auto one = [&](const std::string& name) {
    if (source.has(prefix + name)) out.push_back({prefix + name, 0, -1, times});
  };
  use("attention.norm");
  if (config.multi_latent_attention) {
    use(config.q_lora_rank ? "attention.q_down" : "attention.q");
    use("attention.kv_down");
    if (config.q_lora_rank) {
      use("attention.q_norm");
      use("attention.q_up");
    }
    use("attention.kv_norm");
    use("attention.kv_up");
  } else {
    for (const auto* name : {"attention.q", "attention.k", "attention.v", "attention.q_norm", "attention.k_norm"}) use(name);
    one("attention.sinks");
  }
  for (const auto* name : {"attention.out", "attention.post_norm", "mlp.norm"}) use(name);
  const auto mlp = [&](const std::string& name) {
    if (config.gated_linear_unit) use(name + "gate");
    use(name + "up");
    use(name + "down");
  };
  if (layer.moe) {
    use("mlp.router");
    one("mlp.router.expert_bias");
    for (Index e = 0; e < config.num_experts; ++e) mlp(fmt::format("mlp.experts.{}.", e));
    if (source.has(prefix + "mlp.shared.up.weight")) {
      mlp("mlp.shared.");
      one("mlp.shared.gate_weight");
    }
  } else {
    mlp("mlp.");
  }
  use("mlp.post_norm");
  return out;
}

Tensor layer_forward(RankContext& rank, const shard::LayerConfig& layer, const std::string& prefix, const Rope& rope, Index length,
                   Tensor& hidden) {
  return Layer(rank, layer, prefix, rope, length).run(hidden);
}

}  // namespace lm
