// Attention, latent attention, dense and expert feed-forward, in Megatron's order of operations.
#include "lm/transformer_layer.h"

#include "libshard/error.h"

#include <algorithm>
#include <cmath>

namespace lm {
namespace {

using shard::Code;
using shard::TransformerConfig;

/// A linear's weight and bias, whole.
struct Parameters {
  Weight weight, bias;
};

class Layer {
 public:
  Layer(RankContext& rank, const shard::LayerConfig& layer, const std::string& prefix, const RopeTable& table, Index length)
      : rank_(rank), config_(rank.config), on_(rank.on), layer_(layer), prefix_(prefix), table_(table), length_(length) {}

  void run(Tensor& hidden) {
    auto normed = norm("attention.norm", hidden);
    auto attended = config_.multi_latent_attention ? latent_attention(normed) : attention(normed);
    if (has("attention.post_norm.weight")) attended = norm("attention.post_norm", attended);
    if (config_.parallel_residual) {
      // Both branches start from the same residual; NeoX adds them to each other first.
      auto fed = feed_forward(norm("mlp.norm", hidden));
      lm::add(on_, fed, attended);
      lm::add(on_, hidden, fed);
      return;
    }
    join(hidden, normed, attended);
    auto between = norm("mlp.norm", hidden);
    auto fed = feed_forward(between);
    if (has("mlp.post_norm.weight")) fed = norm("mlp.post_norm", fed);
    join(hidden, between, fed);
  }

 private:
  bool has(const std::string& name) const { return rank_.weights.has(prefix_ + name); }
  Weight take(const std::string& name) { return rank_.weights.take(prefix_ + name); }
  Weight take_if(const std::string& name) { return has(name) ? take(name) : Weight{}; }
  Parameters parameters(const std::string& name) {
    auto weight = take(name + ".weight");
    return {std::move(weight), take_if(name + ".bias")};
  }
  void expect(const Parameters& p, const std::string& name, Index rows, Index columns) const {
    shard::require(p.weight.rows == rows && p.weight.columns == columns, Code::Mismatch, [&] {
      return fmt::format("{}{}.weight: is [{}, {}]; the model's configuration makes it [{}, {}]", prefix_, name, p.weight.rows, p.weight.columns, rows, columns);
    });
    shard::require(!p.bias || p.bias.columns == rows, Code::Mismatch, [&] { return fmt::format("{}{}.bias: has {} numbers for {} rows", prefix_, name, p.bias.columns, rows); });
  }
  Tensor norm(const std::string& name, const Tensor& x) {
    auto p = parameters(name);
    return normalize(on_, x, config_.normalization, config_.layernorm_epsilon, config_.layernorm_zero_centered_gamma, p.weight, p.bias);
  }
  void join(Tensor& hidden, Tensor& normed, const Tensor& branch) {
    if (config_.residual_post_layernorm) hidden = std::move(normed);
    lm::add(on_, hidden, branch);
  }

  /// The rows [lo, lo + count) of a linear: this rank's outputs.
  Tensor column_parallel(const Packed& x, const Parameters& p, Index lo, Index count) {
    Tensor out(x.tokens(), count);
    linear(on_, x, p.weight.row_range(lo, count), p.bias ? p.bias.column_range(lo, count) : Weight{}, out);
    return out;
  }
  /// This rank's inputs are columns [lo, lo + x.columns()); the sum over ranks, bias added once.
  Tensor row_parallel(const Tensor& x, const Parameters& p, Index lo) {
    Tensor out(x.rows(), p.weight.rows);
    const bool bias = p.bias && rank_.tensor.rank() == 0;
    linear(on_, Packed(on_, x), p.weight.column_range(lo, x.columns()), bias ? p.bias : Weight{}, out);
    reduce(out);
    return out;
  }
  void reduce(Tensor& x) {
    if (rank_.tensor.size() == 1) return;
    rank_.tensor.all_reduce_sum(x.values());
    round_values(on_, x.values());
  }

  Tensor attention(const Tensor& x) {
    const auto heads = config_.num_attention_heads, size = config_.kv_channels, ratio = heads / config_.num_query_groups;
    const auto mine = share_of(heads, rank_.tensor.rank(), rank_.tensor.size());
    // Where there are more ranks than groups, neighbours compute the same keys and values.
    const auto group = mine.lo / ratio, groups = (mine.lo + mine.count - 1) / ratio - group + 1;
    const auto wq = parameters("attention.q"), wk = parameters("attention.k"), wv = parameters("attention.v");
    expect(wq, "attention.q", heads * size, config_.hidden_size);
    expect(wk, "attention.k", config_.num_query_groups * size, config_.hidden_size);
    expect(wv, "attention.v", config_.num_query_groups * size, config_.hidden_size);
    const Packed packed(on_, x);
    auto q = column_parallel(packed, wq, mine.lo * size, mine.count * size);
    auto k = column_parallel(packed, wk, group * size, groups * size);
    const auto v = column_parallel(packed, wv, group * size, groups * size);
    head_norm("attention.q_norm", q, mine.count, size, mine.lo);
    head_norm("attention.k_norm", k, groups, size, group);
    if (layer_.rope) {
      apply_rope(on_, table_, q.row(0), q.rows(), q.columns(), mine.count, size, length_);
      apply_rope(on_, table_, k.row(0), k.rows(), k.columns(), groups, size, length_);
    }
    const auto sinks = take_if("attention.sinks");
    AttentionShape shape{x.rows() / length_, length_, mine.count, ratio, mine.lo - group * ratio, size, size, layer_.softmax_scale,
                         config_.attention_softcap, layer_.window, config_.off_by_one_softmax};
    const auto values = lm::attention(on_, shape, q, k, v, sinks ? sinks.column_range(mine.lo, mine.count) : Weight{});
    const auto out = parameters("attention.out");
    expect(out, "attention.out", config_.hidden_size, heads * size);
    return row_parallel(values, out, mine.lo * size);
  }

  /// Over each head's lanes, or (one weight for all lanes of all heads) over the row.
  void head_norm(const std::string& name, Tensor& x, Index heads, Index size, Index) {
    if (!has(name + ".weight")) {
      if (config_.qk_l2_norm) normalize_pieces(on_, x.row(0), x.rows(), x.columns(), heads, size, shard::Normalization::RMSNorm, config_.layernorm_epsilon, false, {}, {});
      return;
    }
    const auto p = parameters(name);
    shard::require(p.weight.columns == size, Code::Mismatch, [&] { return fmt::format("{}{}.weight: has {} numbers; a head has {}", prefix_, name, p.weight.columns, size); });
    normalize_pieces(on_, x.row(0), x.rows(), x.columns(), heads, size, config_.normalization, config_.layernorm_epsilon, config_.layernorm_zero_centered_gamma, p.weight, p.bias);
  }

  void latent_norm(const std::string& name, Tensor& x, Index width) {
    if (!has(name + ".weight")) return;
    const auto p = parameters(name);
    normalize_pieces(on_, x.row(0), x.rows(), x.columns(), 1, width, config_.normalization, config_.latent_norm_epsilon, config_.layernorm_zero_centered_gamma, p.weight, p.bias);
  }

  Tensor latent_attention(const Tensor& x) {
    const auto heads = config_.num_attention_heads, nope = config_.qk_head_dim, turned = config_.qk_pos_emb_head_dim, width = nope + turned,
               value = config_.v_head_dim, latent = config_.kv_lora_rank;
    const auto mine = share_of(heads, rank_.tensor.rank(), rank_.tensor.size());
    const Packed packed(on_, x);
    Tensor q;
    if (config_.q_lora_rank) {
      const auto down = parameters("attention.q_down");
      expect(down, "attention.q_down", config_.q_lora_rank, config_.hidden_size);
      auto small = column_parallel(packed, down, 0, config_.q_lora_rank);
      latent_norm("attention.q_norm", small, config_.q_lora_rank);
      const auto up = parameters("attention.q_up");
      expect(up, "attention.q_up", heads * width, config_.q_lora_rank);
      q = column_parallel(Packed(on_, small), up, mine.lo * width, mine.count * width);
    } else {
      const auto whole = parameters("attention.q");
      expect(whole, "attention.q", heads * width, config_.hidden_size);
      q = column_parallel(packed, whole, mine.lo * width, mine.count * width);
    }
    const auto down = parameters("attention.kv_down");
    expect(down, "attention.kv_down", latent + turned, config_.hidden_size);
    auto compressed = column_parallel(packed, down, 0, latent + turned);
    latent_norm("attention.kv_norm", compressed, latent);
    const auto up = parameters("attention.kv_up");
    expect(up, "attention.kv_up", heads * (nope + value), latent);
    Tensor small(x.rows(), latent);
    for (Index r = 0; r < x.rows(); ++r) std::copy(compressed.row(r), compressed.row(r) + latent, small.row(r));
    const auto kv = column_parallel(Packed(on_, small), up, mine.lo * (nope + value), mine.count * (nope + value));
    if (layer_.rope) {
      apply_rope(on_, table_, q.row(0) + nope, q.rows(), q.columns(), mine.count, width, length_);
      apply_rope(on_, table_, compressed.row(0) + latent, x.rows(), compressed.columns(), 1, turned, length_);
    }
    Tensor k(x.rows(), mine.count * width), v(x.rows(), mine.count * value);
    for (Index r = 0; r < x.rows(); ++r)
      for (Index h = 0; h < mine.count; ++h) {
        const auto* from = kv.row(r) + h * (nope + value);
        auto* key = std::copy(from, from + nope, k.row(r) + h * width);
        std::copy(compressed.row(r) + latent, compressed.row(r) + latent + turned, key);
        std::copy(from + nope, from + nope + value, v.row(r) + h * value);
      }
    AttentionShape shape{x.rows() / length_, length_, mine.count, 1, 0, width, value, layer_.softmax_scale, config_.attention_softcap, layer_.window,
                         config_.off_by_one_softmax};
    const auto values = lm::attention(on_, shape, q, k, v, {});
    const auto out = parameters("attention.out");
    expect(out, "attention.out", config_.hidden_size, heads * value);
    return row_parallel(values, out, mine.lo * value);
  }

  Tensor feed_forward(const Tensor& x) { return layer_.moe ? mixture(x) : dense(x, "mlp."); }

  /// Rows of gate and up, columns of down. The partial sum: the caller reduces.
  Tensor partial_mlp(const Packed& x, const std::string& name, const std::vector<float>* row_weights) {
    Parameters gate;
    if (config_.gated_linear_unit) gate = parameters(name + "gate");
    const auto up = parameters(name + "up");
    const auto mine = share_of(up.weight.rows, rank_.tensor.rank(), rank_.tensor.size());
    expect(up, name + "up", up.weight.rows, config_.hidden_size);
    Tensor left, right = column_parallel(x, up, mine.lo, mine.count);
    if (config_.gated_linear_unit) {
      expect(gate, name + "gate", up.weight.rows, config_.hidden_size);
      left = column_parallel(x, gate, mine.lo, mine.count);
    }
    activate(on_, config_, config_.gated_linear_unit ? &left : nullptr, right);
    if (row_weights) {  // Megatron weighs an expert's rows before its second linear; that linear's bias is weighed as well
      for (Index r = 0; r < right.rows(); ++r)
        for (Index c = 0; c < right.columns(); ++c) right.row(r)[c] *= (*row_weights)[static_cast<std::size_t>(r)];
      round_values(on_, right.values());
    }
    const auto down = parameters(name + "down");
    expect(down, name + "down", config_.hidden_size, up.weight.rows);
    Tensor out(right.rows(), config_.hidden_size);
    const bool bias = down.bias && rank_.tensor.rank() == 0;
    linear(on_, Packed(on_, right), down.weight.column_range(mine.lo, mine.count), bias && !row_weights ? down.bias : Weight{}, out);
    if (bias && row_weights) {
      for (Index r = 0; r < out.rows(); ++r)
        for (Index c = 0; c < out.columns(); ++c) out.row(r)[c] += down.bias.at(0, c) * (*row_weights)[static_cast<std::size_t>(r)];
      round_values(on_, out.values());
    }
    return out;
  }

  Tensor dense(const Tensor& x, const std::string& name) {
    auto out = partial_mlp(Packed(on_, x), name, nullptr);
    reduce(out);
    return out;
  }

  Tensor mixture(const Tensor& x) {
    const auto router = parameters("mlp.router");
    expect(router, "mlp.router", config_.num_experts, config_.hidden_size);
    Tensor logits(x.rows(), config_.num_experts);
    const bool fp32 = on_.compute == Compute::F32 || config_.router.fp32;
    if (fp32 && on_.compute != Compute::F32) {  // both operands widened, as moe_router_dtype fp32 does
      for (Index r = 0; r < x.rows(); ++r)
        for (Index e = 0; e < config_.num_experts; ++e) {
          double sum = router.bias ? static_cast<double>(router.bias.at(0, e)) : 0.0;
          for (Index c = 0; c < x.columns(); ++c) sum += static_cast<double>(x.row(r)[c]) * static_cast<double>(router.weight.at(e, c));
          logits.row(r)[e] = static_cast<float>(sum);
        }
    } else {
      linear(on_, Packed(on_, x), router.weight, router.bias, logits);
    }
    const auto routing = route(on_, config_.router, logits, take_if("mlp.router.expert_bias"));
    Tensor out(x.rows(), config_.hidden_size);
    std::fill(out.values().begin(), out.values().end(), 0.0f);
    for (Index e = 0; e < config_.num_experts; ++e) {
      const auto name = fmt::format("mlp.experts.{}.", e);
      std::vector<Index> rows;
      std::vector<float> weights;
      for (std::size_t i = 0; i < routing.expert.size(); ++i)
        if (routing.expert[i] == e) {
          rows.push_back(static_cast<Index>(i) / routing.topk);
          weights.push_back(routing.weight[i]);
        }
      if (rows.empty()) {
        pass(name);
        continue;
      }
      Tensor chosen(static_cast<Index>(rows.size()), x.columns());
      for (std::size_t i = 0; i < rows.size(); ++i) {
        const auto* from = x.row(rows[i]);
        const auto factor = config_.moe_probs_on_input ? weights[i] : 1.0f;
        for (Index c = 0; c < x.columns(); ++c) chosen.row(static_cast<Index>(i))[c] = from[c] * factor;
      }
      if (config_.moe_probs_on_input) {
        round_values(on_, chosen.values());
        std::fill(weights.begin(), weights.end(), 1.0f);
      }
      const auto part = partial_mlp(Packed(on_, chosen), name, &weights);
      for (std::size_t i = 0; i < rows.size(); ++i) {
        auto* to = out.row(rows[i]);
        for (Index c = 0; c < out.columns(); ++c) to[c] += part.row(static_cast<Index>(i))[c];
        round_values(on_, {to, static_cast<std::size_t>(out.columns())});
      }
    }
    if (has("mlp.shared.up.weight")) {
      auto shared = partial_mlp(Packed(on_, x), "mlp.shared.", nullptr);
      if (has("mlp.shared.gate_weight")) {
        const auto gate = take("mlp.shared.gate_weight");
        Tensor open(x.rows(), 1);
        linear(on_, Packed(on_, x), gate, {}, open);
        for (Index r = 0; r < x.rows(); ++r)
          for (Index c = 0; c < shared.columns(); ++c) shared.row(r)[c] *= 1.0f / (1.0f + std::exp(-open.row(r)[0]));
        round_values(on_, shared.values());
      }
      lm::add(on_, out, shared);
    }
    reduce(out);
    return out;
  }

  /// Takes an expert's weights and lets them go: no token came.
  void pass(const std::string& name) {
    for (const auto* part : {"gate.weight", "gate.bias", "up.weight", "up.bias", "down.weight", "down.bias"})
      if ((config_.gated_linear_unit || part[0] != 'g') && has(name + part)) take(name + part);
  }

  RankContext& rank_;
  const TransformerConfig& config_;
  const Context& on_;
  const shard::LayerConfig& layer_;
  std::string prefix_;
  const RopeTable& table_;
  Index length_;
};

}  // namespace

Share share_of(Index all, int rank, int size) {
  const auto lo = all * rank / size;
  return {lo, all * (rank + 1) / size - lo};
}

std::vector<WeightUse> layer_uses(const WeightSource& source, const TransformerConfig& config, const shard::LayerConfig& layer,
                                  const std::string& prefix, int times) {
  std::vector<WeightUse> out;
  const auto use = [&](const std::string& name) {
    for (const auto* part : {".weight", ".bias"})
      if (source.has(prefix + name + part)) out.push_back({prefix + name + part, 0, -1, times});
  };
  const auto one = [&](const std::string& name) {
    if (source.has(prefix + name)) out.push_back({prefix + name, 0, -1, times});
  };
  use("attention.norm");
  if (config.multi_latent_attention) {
    if (config.q_lora_rank) {
      use("attention.q_down");
      use("attention.q_norm");
      use("attention.q_up");
    } else {
      use("attention.q");
    }
    use("attention.kv_down");
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

void layer_forward(RankContext& rank, const shard::LayerConfig& layer, const std::string& prefix, const RopeTable& table, Index length,
                   Tensor& hidden) {
  Layer(rank, layer, prefix, table, length).run(hidden);
}

}  // namespace lm
