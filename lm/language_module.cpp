// Embedding, decoder, multi-token prediction and head, each on the stage that holds it.
#include "lm/language_module.h"

#include "libshard/error.h"
#include "lm/cpu/numbers.h"
#include "lm/saved_model.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>
#include <set>

namespace lm {
namespace {

using shard::Code;

constexpr const char* kEmbedding = "embedding.word.weight";
constexpr const char* kPositions = "embedding.position.weight";
constexpr const char* kHead = "output.weight";

std::string layer_prefix(Index layer) { return fmt::format("layers.{}.", layer); }
std::string mtp_prefix(Index depth) { return fmt::format("mtp.{}.", depth); }

void use_if(const WeightSource& source, std::vector<WeightUse>& out, const std::string& name, int times = 1) {
  for (const auto* part : {".weight", ".bias"})
    if (source.has(name + part)) out.push_back({name + part, 0, -1, times});
}

Tensor final_norm(const Context& on, const shard::TransformerConfig& config, WeightStream& weights, const std::string& name, const Tensor& x) {
  const auto weight = weights.take(name + ".weight");
  const auto bias = weights.has(name + ".bias") ? weights.take(name + ".bias") : Weight{};
  return normalize(on, x, config.normalization, config.layernorm_epsilon, config.layernorm_zero_centered_gamma, weight, bias);
}

}  // namespace

std::vector<Index> roll_left(const std::vector<Index>& values, Index length) {
  std::vector<Index> out(values.size(), 0);
  for (std::size_t i = 0; i + 1 < values.size(); ++i)
    if ((static_cast<Index>(i) + 1) % length != 0) out[i] = values[i + 1];
  return out;
}

Placement placement_of(const shard::TransformerConfig& config, int pipeline_rank, int pipeline_size) {
  shard::require(pipeline_size >= 1 && pipeline_size <= config.num_layers, Code::BadLayout,
                 [&] { return fmt::format("layout: {} pipeline stages for {} layers", pipeline_size, config.num_layers); });
  const auto share = share_of(config.num_layers, pipeline_rank, pipeline_size);
  const bool last = pipeline_rank == pipeline_size - 1;
  return {pipeline_rank, pipeline_size, share.lo, share.count, pipeline_rank == 0, last, last && config.mtp_num_layers > 0};
}

shard::Pipeline pipeline_of(const shard::TransformerConfig& config, int pipeline_size) {
  shard::Pipeline out;
  out.stages = pipeline_size;
  out.mtp_layers = config.mtp_num_layers;
  for (int p = 0; p < pipeline_size; ++p) {
    const auto place = placement_of(config, p, pipeline_size);
    auto& layers = out.layers.emplace_back(static_cast<std::size_t>(place.layers));
    std::iota(layers.begin(), layers.end(), place.first_layer);
  }
  out.output = out.mtp = out.final_norm = {pipeline_size - 1, 0};
  return out;
}

std::vector<int> embedding_ranks(const shard::TransformerConfig& config, int pipeline_size) {
  std::vector<int> out{0};
  if (pipeline_size > 1 && (config.tied || config.mtp_num_layers > 0)) out.push_back(pipeline_size - 1);
  return out;
}

void refuse_unused(const shard::ShardedStateDict& dict, const std::vector<WeightUse>& used) {
  std::set<std::string> names;
  for (const auto& use : used) {
    names.insert(use.name);
    if (const auto tie = dict.ties.find(use.name); tie != dict.ties.end()) names.insert(tie->second);
  }
  for (const auto& entry : dict.tensors)
    shard::require(names.contains(entry.first), Code::Mismatch, [&] { return fmt::format("{}: no part of the model that the configuration describes uses it", entry.first); });
}

LanguageModule::LanguageModule(const shard::TransformerConfig& config, WeightSource& source, Placement placement, Comm tensor, Comm pipeline, Context on)
    : config_(config), source_(source), placement_(placement), tensor_(tensor), pipeline_(pipeline), on_(on) {
  const auto& table = source_.shape(kEmbedding);
  shard::require(table.size() == 2 && table[1] == config_.hidden_size, Code::Mismatch,
                 [&] { return fmt::format("{}: is {}; rows should have {} numbers", kEmbedding, shard::to_string(table), config_.hidden_size); });
  vocab_ = table[0];
  if (!config_.tied) {
    const auto& rows = source_.shape(kHead);
    shard::require(rows == table, Code::Mismatch, [&] { return fmt::format("{}: is {}; the embedding is {}", kHead, shard::to_string(rows), shard::to_string(table)); });
  }
}

Share LanguageModule::vocabulary_share() const { return share_of(vocab_, tensor_.rank(), tensor_.size()); }
std::string LanguageModule::head_name() const { return config_.tied ? kEmbedding : kHead; }

/// The head comes in blocks of rows that are the same for every rank, so that one read serves all.
std::vector<std::pair<Index, Index>> LanguageModule::head_blocks() const {
  constexpr Index kBytes = 32 << 20;
  const auto rows = std::max<Index>(48, kBytes / (2 * config_.hidden_size) / 48 * 48);
  std::vector<std::pair<Index, Index>> out;
  for (Index lo = 0; lo < vocab_; lo += rows) out.emplace_back(lo, std::min(rows, vocab_ - lo));
  return out;
}

std::vector<WeightUse> LanguageModule::weight_uses(Index steps, bool mtp) const {
  const int ranks = tensor_.size();
  std::vector<WeightUse> out;
  for (Index l = placement_.first_layer; l < placement_.first_layer + placement_.layers; ++l) {
    const auto layer = layer_uses(source_, config_, config_.layers[static_cast<std::size_t>(l)], layer_prefix(l), ranks);
    out.insert(out.end(), layer.begin(), layer.end());
  }
  if (placement_.post_process) {
    use_if(source_, out, "final_norm", ranks);
    const auto depths = config_.mtp_repeated_layer ? std::min<Index>(1, config_.mtp_num_layers) : config_.mtp_num_layers;
    for (Index k = 0; k < depths; ++k) {
      // Every depth's layer is taken once, by each step again, and a repeated layer once for each depth.
      const auto times = mtp ? ranks * static_cast<int>((config_.mtp_repeated_layer ? config_.mtp_num_layers : 1) + steps) : 0;
      for (const auto* name : {"enorm", "hnorm", "eh_proj"}) use_if(source_, out, mtp_prefix(k) + name, times);
      const auto layer = layer_uses(source_, config_, config_.mtp_layer(k), mtp_prefix(k) + "layer.", times);
      out.insert(out.end(), layer.begin(), layer.end());
      use_if(source_, out, mtp_prefix(k) + "final_norm", times);
    }
    for (const auto& [lo, count] : head_blocks()) out.push_back({head_name(), lo, count, ranks});
  }
  if (placement_.pre_process) {
    // Tokens' rows are read one by one; the whole table is only looked at.
    if (!(config_.tied && placement_.post_process))
      for (const auto& [lo, count] : head_blocks()) out.push_back({kEmbedding, lo, count, 0});
    if (source_.has(kPositions)) out.push_back({kPositions, 0, -1, 0});
  }
  return out;
}

std::optional<std::string> LanguageModule::shared_embedding_or_output_weight() const {
  if (placement_.pre_process || placement_.mtp_process) return kEmbedding;
  if (placement_.post_process) return head_name();
  return std::nullopt;
}

bool LanguageModule::is_in_embd_group() const {
  const auto ranks = embedding_ranks(config_, placement_.pipeline_size);
  return placement_.mtp_process || std::find(ranks.begin(), ranks.end(), placement_.pipeline_rank) != ranks.end();
}

void LanguageModule::setup_embeddings_and_output_layer() {
  if (placement_.pipeline_size == 1 || !(config_.tied || config_.mtp_num_layers > 0)) return;
  // Every stage reads the one stored copy, so the sum that Megatron forms reduces to agreement on its first row.
  float mine = 0, members = 0;
  if (is_in_embd_group()) {
    const auto row = source_.read(kEmbedding, 0, 1);
    for (Index c = 0; c < row.columns; ++c) mine += row.at(0, c);
    members = 1;
  }
  float sums[2] = {mine, members};
  pipeline_.all_reduce_sum(sums);
  shard::require(members == 0 || sums[0] == mine * sums[1] || mine != mine || std::abs(sums[0] - mine * sums[1]) <= std::abs(sums[0]) * 1e-6f, Code::Mismatch,
                 [] { return fmt::format("{}: its copies on the first and the last stage differ", kEmbedding); });
}

Tensor LanguageModule::embed(const std::vector<Index>& ids, const std::vector<Index>& positions) {
  const auto mine = vocabulary_share();
  auto out = source_.gather(kEmbedding, ids, mine.lo, mine.lo + mine.count);
  tensor_.all_reduce_sum(out.values());
  auto factor = config_.embedding_multiplier;
  if (config_.embedding_multiplier_rounded) {
    // Gemma's √h is a number of the weights' type, which in f32 computation is f32.
    factor = on_.compute == Compute::Bf16 ? static_cast<double>(cpu::round_bf16(static_cast<float>(factor))) : static_cast<double>(static_cast<float>(factor));
  }
  scale(on_, out, factor);
  if (source_.has(kPositions)) add(on_, out, source_.gather(kPositions, positions, 0, source_.shape(kPositions)[0]));
  return out;
}

void LanguageModule::scale_logits(Tensor& logits) const {
  scale(on_, logits, config_.logits_multiplier);
  softcap(on_, logits, config_.logits_softcap);
}

std::vector<float> LanguageModule::compute_language_model_loss(const std::vector<Index>& labels, const Tensor& logits, Index first, Index limit) {
  CrossEntropy loss(labels, limit);
  loss.add(on_, logits, first);
  return loss.finish(tensor_);
}

void LanguageModule::mtp_layer(WeightStream& weights, Index depth, const std::vector<Index>& ids, const std::vector<Index>& positions,
                               const RopeTable& table, Index length, Tensor& hidden) {
  const auto prefix = mtp_prefix(config_.mtp_repeated_layer ? 0 : depth);
  const auto embedded = embed(ids, positions);
  const auto e = final_norm(on_, config_, weights, prefix + "enorm", embedded), h = final_norm(on_, config_, weights, prefix + "hnorm", hidden);
  const auto size = config_.hidden_size;
  Tensor both(hidden.rows(), 2 * size);
  for (Index r = 0; r < both.rows(); ++r) std::copy(h.row(r), h.row(r) + size, std::copy(e.row(r), e.row(r) + size, both.row(r)));
  // Megatron gathers a column-parallel product here; every rank computes all of it instead.
  const auto weight = weights.take(prefix + "eh_proj.weight");
  Tensor joined(hidden.rows(), size);
  linear(on_, Packed(on_, both), weight, {}, joined);
  auto here = rank(weights);
  layer_forward(here, config_.mtp_layer(depth), prefix + "layer.", table, length, joined);
  hidden = final_norm(on_, config_, weights, prefix + "final_norm", joined);
}

Tensor LanguageModule::compute_mtp_single_step(WeightStream& weights, const MtpStep& step) {
  shard::require(step.depth >= 0 && step.depth < config_.mtp_num_layers, Code::Mismatch,
                 [&] { return fmt::format("mtp_step.{}: the model predicts {} tokens ahead", step.depth, config_.mtp_num_layers); });
  auto hidden = step.in_hidden.clone();
  // The method passes no rotary table; latent attention builds its own for rows 0 … N−1.
  const auto table = config_.multi_latent_attention ? rope_table(config_.rope, hidden.rows()) : RopeTable{};
  mtp_layer(weights, step.depth, step.next_token_ids, step.position_ids, table, hidden.rows(), hidden);
  return hidden;
}

shard::RankStateDict LanguageModule::sharded_state_dict(const std::string& prefix, shard::LayerSpec spec) const {
  auto model = saved_model(config_, source_);
  model.spec = spec;
  shard::Parallel parallel;
  parallel.tp = parallel.etp = tensor_.size();
  parallel.pp = placement_.pipeline_size;
  return shard::sharded_state_dict(model, parallel, pipeline_of(config_, placement_.pipeline_size), {placement_.pipeline_rank, 0, tensor_.rank(), 0}, prefix);
}

void LanguageModule::tie_embeddings_and_output_weights_state_dict(shard::RankStateDict& dict, const std::string& output_layer_weight_key,
                                                                  const std::string& first_stage_word_emb_key) const {
  if (!config_.tied) return;
  const shard::StageRole role{placement_.pre_process, placement_.post_process, placement_.mtp_process};
  shard::tie_embeddings_and_output_weights_state_dict(dict, role, output_layer_weight_key, first_stage_word_emb_key, 0);
}

void LanguageModule::note(const std::string& name, const Tensor& hidden, ForwardResult& result, std::mutex& mutex) const {
  if (tensor_.rank() != 0) return;
  HiddenStats stats{name, 0, 0, 0, 1469598103934665603ull};
  double squares = 0;
  for (const auto value : hidden.values()) {
    stats.digest = (stats.digest ^ std::bit_cast<std::uint32_t>(value)) * 1099511628211ull;
    if (!std::isfinite(value)) ++stats.nonfinite;
    else {
      squares += static_cast<double>(value) * static_cast<double>(value);
      stats.max_abs = std::max(stats.max_abs, std::abs(static_cast<double>(value)));
    }
  }
  stats.rms = std::sqrt(squares / std::max<double>(1, static_cast<double>(hidden.values().size())));
  const std::lock_guard lock(mutex);
  result.hidden.push_back(std::move(stats));
}

void LanguageModule::forward(WeightStream& weights, const ForwardRequest& request, ForwardResult& result, std::mutex& mutex) {
  const auto& batch = request.batch;
  setup_embeddings_and_output_layer();
  Tensor hidden;
  if (placement_.pre_process) {
    hidden = embed(batch.input_ids, batch.position_ids);
    note("embedding", hidden, result, mutex);
  } else {
    hidden = pipeline_.receive(placement_.pipeline_rank - 1);
  }
  const auto table = rope_table(config_.rope, batch.length), local = rope_table(config_.rope_local, batch.length);
  for (Index l = placement_.first_layer; l < placement_.first_layer + placement_.layers; ++l) {
    const auto& layer = config_.layers[static_cast<std::size_t>(l)];
    auto here = rank(weights);
    layer_forward(here, layer, layer_prefix(l), layer.local_rope ? local : table, batch.length, hidden);
    note(fmt::format("layer {}", l), hidden, result, mutex);
  }
  if (!placement_.post_process) return pipeline_.send(placement_.pipeline_rank + 1, std::move(hidden));

  std::vector<Tensor> states;
  states.push_back(final_norm(on_, config_, weights, "final_norm", hidden));
  note("final_norm", states.back(), result, mutex);
  if (request.mtp) {
    auto ids = batch.input_ids, positions = batch.position_ids;
    std::size_t before = 0;  // the state that the next depth starts from; steps lie between
    for (Index k = 0; k < config_.mtp_num_layers; ++k) {
      ids = roll_left(ids, batch.length);
      positions = roll_left(positions, batch.length);
      auto next = states[before].clone();
      mtp_layer(weights, k, ids, positions, table, batch.length, next);
      note(fmt::format("mtp {}", k), next, result, mutex);
      before = states.size();
      states.push_back(std::move(next));
      for (const auto& step : request.steps)
        if (step.depth == k) states.push_back(compute_mtp_single_step(weights, step));
    }
  }
  head(weights, request, states, result, mutex);
}

void LanguageModule::head(WeightStream& weights, const ForwardRequest& request, const std::vector<Tensor>& states, ForwardResult& result, std::mutex& mutex) {
  // Order of `states`: the decoder, then for each depth its training state followed by its steps.
  struct Output {
    LogitsBlock::Of of;
    Index index;
    const Tensor* hidden;
    Packed packed;
    std::vector<CrossEntropy> losses;
  };
  std::vector<Output> outputs;
  std::vector<std::vector<Index>> labels{request.batch.labels};
  const auto losses = [&](const std::vector<Index>& targets) {
    std::vector<CrossEntropy> out;
    for (const auto limit : {vocab_, request.true_vocab, request.reference_vocab}) out.emplace_back(targets, limit);
    return out;
  };
  std::size_t at = 0;
  outputs.push_back({LogitsBlock::Of::Main, 0, &states[at], Packed(on_, states[at]), losses(labels[0])});
  ++at;
  for (Index k = 0; request.mtp && k < config_.mtp_num_layers; ++k) {
    labels.push_back(roll_left(labels.back(), request.batch.length));
    outputs.push_back({LogitsBlock::Of::Mtp, k, &states[at], Packed(on_, states[at]), losses(labels.back())});
    ++at;
    for (std::size_t s = 0; s < request.steps.size(); ++s)
      if (request.steps[s].depth == k) {
        outputs.push_back({LogitsBlock::Of::Step, static_cast<Index>(s), &states[at], Packed(on_, states[at]), {}});
        ++at;
      }
  }
  const auto mine = vocabulary_share();
  double peak = 0;
  std::uint64_t nonfinite = 0;
  for (const auto& [first, count] : head_blocks()) {
    const auto block = weights.take(head_name(), first);
    const auto lo = std::max(first, mine.lo), hi = std::min(first + count, mine.lo + mine.count);
    if (lo >= hi) continue;
    const auto rows = block.row_range(lo - first, hi - lo);
    for (auto& output : outputs) {
      Tensor logits(output.hidden->rows(), hi - lo);
      linear(on_, output.packed, rows, {}, logits);
      scale_logits(logits);
      for (auto& loss : output.losses) loss.add(on_, logits, lo);
      if (output.of == LogitsBlock::Of::Main)
        for (Index r = 0; r < logits.rows(); ++r)
          for (Index c = 0; c < std::min(hi, request.true_vocab) - lo; ++c) {
            const auto value = std::abs(logits.row(r)[c]);
            if (value <= 3e38f) peak = value > static_cast<float>(peak) ? static_cast<double>(value) : peak;
            else ++nonfinite;
          }
      if (request.on_logits) {
        const std::lock_guard lock(mutex);
        request.on_logits({output.of, output.index, lo, logits});
      }
    }
  }
  std::vector<std::vector<std::vector<float>>> found;
  for (auto& output : outputs) {
    auto& of_output = found.emplace_back();
    for (auto& loss : output.losses) of_output.push_back(loss.finish(tensor_));
  }
  const std::lock_guard lock(mutex);
  result.peak_logit = std::max(result.peak_logit, peak);
  result.nonfinite_logits += nonfinite;
  if (tensor_.rank() != 0) return;
  result.mtp.resize(static_cast<std::size_t>(request.mtp ? config_.mtp_num_layers : 0));
  result.mtp_labels.assign(labels.begin() + 1, labels.end());
  result.step_hidden.resize(request.steps.size());
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    if (outputs[i].of == LogitsBlock::Of::Step) {
      result.step_hidden[static_cast<std::size_t>(outputs[i].index)] = outputs[i].hidden->clone();
      continue;
    }
    ForwardResult::Losses losses_here{std::move(found[i][0]), std::move(found[i][1]), std::move(found[i][2])};
    (outputs[i].of == LogitsBlock::Of::Main ? result.main : result.mtp[static_cast<std::size_t>(outputs[i].index)]) = std::move(losses_here);
  }
}

}  // namespace lm
