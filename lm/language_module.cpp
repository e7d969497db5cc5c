// Embedding, decoder, multi-token prediction and head, each on the stage that holds it.
#include "lm/language_module.h"

#include "libshard/error.h"
#include "libshard/fnv1a.h"
#include "lm/cpu/numbers.h"
#include "lm/saved_model.h"

#include <algorithm>
#include <array>
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

Norm norm_of(const shard::TransformerConfig& config) { return {config.normalization, config.layernorm_epsilon, config.layernorm_zero_centered_gamma}; }
Linear parameters(Weights& weights, const std::string& name) {
  auto weight = weights.take(name + ".weight");
  return {std::move(weight), weights.has(name + ".bias") ? weights.take(name + ".bias") : Weight{}};
}
Tensor final_norm(Ops& on, const shard::TransformerConfig& config, Weights& weights, const std::string& name, const Tensor& x) {
  return on.normalize(x, norm_of(config), parameters(weights, name));
}

/// A name for a table's shape, its type in products, and the bits of 64 of its rows (all, where there are no more), evenly spread, the
/// first and the last among them: a table of another checkpoint, iteration, shift or padding differs; one changed row between them may not.
std::uint64_t fingerprint(WeightSource& source, const std::string& name) {
  auto out = shard::kFnv1aStart;
  const auto take = [&](std::span<const std::byte> bytes) { out = shard::fnv1a(bytes, out); };
  const auto& shape = source.shape(name);
  take(std::as_bytes(std::span(shape)));
  const auto rows = shape[0], looked = std::min<Index>(rows, 64);
  for (Index i = 0; i < looked; ++i) {
    const auto row = source.read(name, looked == 1 ? 0 : i * (rows - 1) / (looked - 1), 1);
    take({&reinterpret_cast<const std::byte&>(row.dtype), sizeof row.dtype});
    take({row.data, static_cast<std::size_t>(row.columns) * size_of(row.dtype)});
  }
  return out;
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

LanguageModule::LanguageModule(const shard::TransformerConfig& config, WeightSource& source, Placement placement, Comm& tensor, Comm& pipeline, Ops& on)
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
  std::vector<WeightUse> out;
  for (Index l = placement_.first_layer; l < placement_.first_layer + placement_.layers; ++l) {
    const auto layer = layer_uses(source_, config_, config_.layers[static_cast<std::size_t>(l)], layer_prefix(l), 1);
    out.insert(out.end(), layer.begin(), layer.end());
  }
  if (placement_.post_process) {
    use_if(source_, out, "final_norm");
    const auto depths = config_.mtp_repeated_layer ? std::min<Index>(1, config_.mtp_num_layers) : config_.mtp_num_layers;
    for (Index k = 0; k < depths; ++k) {
      // Every depth's layer is taken once, by each step again, and a repeated layer once for each depth.
      const auto times = mtp ? static_cast<int>((config_.mtp_repeated_layer ? config_.mtp_num_layers : 1) + steps) : 0;
      for (const auto* name : {"enorm", "hnorm", "eh_proj"}) use_if(source_, out, mtp_prefix(k) + name, times);
      const auto layer = layer_uses(source_, config_, config_.mtp_layer(k), mtp_prefix(k) + "layer.", times);
      out.insert(out.end(), layer.begin(), layer.end());
      use_if(source_, out, mtp_prefix(k) + "final_norm", times);
    }
    for (const auto& [lo, count] : head_blocks()) out.push_back({head_name(), lo, count, 1});
  }
  if (placement_.pre_process) {
    // Tokens' rows are read one by one; the whole table is only looked at.
    if (!(config_.tied && placement_.post_process))
      for (const auto& [lo, count] : head_blocks()) out.push_back({kEmbedding, lo, count, 0});
    if (source_.has(kPositions)) out.push_back({kPositions, 0, -1, 0});
  }
  return out;
}

std::vector<std::string> LanguageModule::gathered_weights() const {
  std::vector<std::string> out;
  if (!placement_.pre_process && !placement_.mtp_process) return out;
  out.push_back(kEmbedding);
  if (source_.has(kPositions)) out.push_back(kPositions);
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

std::vector<ParameterMarks> LanguageModule::embedding_and_output_marks() const {
  const bool copies = config_.tied || config_.mtp_num_layers > 0, piped = placement_.pipeline_size > 1;
  const bool embeds = placement_.pre_process || placement_.mtp_process;
  // Which of this stage's weights shared_embedding_or_output_weight() names.
  const bool first = piped && placement_.pre_process && !placement_.post_process;
  const bool copy = piped && !placement_.pre_process && ((placement_.post_process && config_.tied) || placement_.mtp_process);
  std::vector<ParameterMarks> out;
  const auto add = [&](const char* name, bool embedding_or_output, bool shared) {
    out.push_back({name, embedding_or_output, config_.use_mup, copies && shared && (first || copy), copies && shared && copy, copies && shared && !piped});
  };
  if (embeds) {
    add("embedding.word_embeddings.weight", true, true);
    if (config_.use_mup && source_.has(kPositions)) add("embedding.position_embeddings.weight", false, false);
  }
  // Where one stage embeds and has a tied head, the head owns no weight.
  if (placement_.post_process && !(config_.tied && placement_.pre_process)) add("output_layer.weight", true, !embeds);
  return out;
}

void LanguageModule::setup_embeddings_and_output_layer() {
  if (placement_.pipeline_size == 1 || !(config_.tied || config_.mtp_num_layers > 0)) return;
  // Megatron fills the copies with zeros and adds the first stage's to them. Here each stage reads its own, so they must be equal already.
  // Sixteen bits are exact in a float; where largest and smallest are one, all members say the same.
  std::array<float, 8> parts;
  parts.fill(-INFINITY);
  if (is_in_embd_group()) {
    const auto print = fingerprint(source_, *shared_embedding_or_output_weight());
    for (std::size_t i = 0; i < 4; ++i) {
      parts[i] = static_cast<float>(print >> (16 * i) & 0xffff);
      parts[i + 4] = -parts[i];
    }
  }
  pipeline_.all_reduce_max(parts);
  for (std::size_t i = 0; i < 4; ++i)
    shard::require(parts[i] == -parts[i + 4], Code::Mismatch, [] { return fmt::format("{}: its copies on the first and the last stage differ", kEmbedding); });
}

Tensor LanguageModule::embed(Weights& weights, const Ids& ids, const Ids& positions) {
  const auto mine = vocabulary_share();
  auto out = weights.gather(kEmbedding, ids, mine.lo, mine.lo + mine.count);
  if (tensor_.size() > 1) tensor_.all_reduce_sum(out);
  auto factor = config_.embedding_multiplier;
  if (config_.embedding_multiplier_rounded) {
    // Gemma's √h is a number of the weights' type, which in f32 computation is f32.
    factor = rounds_to_bf16(on_.compute()) ? static_cast<double>(cpu::round_bf16(static_cast<float>(factor))) : static_cast<double>(static_cast<float>(factor));
  }
  if (source_.has(kPositions)) on_.add(out, weights.gather(kPositions, positions, 0, source_.shape(kPositions)[0]));
  on_.scale(out, factor);
  return out;
}

void LanguageModule::scale_logits(Tensor& logits) const {
  on_.scale(logits, config_.logits_multiplier);
  on_.softcap(logits, config_.logits_softcap);
}

std::vector<float> LanguageModule::compute_language_model_loss(const std::vector<Index>& labels, const Tensor& logits, Index first, Index limit, double label_smoothing) {
  shard::require(label_smoothing >= 0 && label_smoothing < 1, Code::Usage, [&] { return fmt::format("label smoothing: is {}; should be in [0, 1)", label_smoothing); });
  const auto sum = on_.cross_entropy(on_.ids(labels), limit);
  sum->add(logits, first);
  auto out = sum->finish(tensor_);
  if (label_smoothing == 0) return out;
  const auto columns = std::min(logits.columns(), limit - first);
  shard::require(columns > 1, Code::BadLayout, [&] { return fmt::format("label smoothing: spreads over {} columns of this rank; should be two or more", columns); });
  const auto x = on_.to_host(logits);
  // loss + behind is the logarithm of the sum of exponentials: behind a known label's logit, which lies with one rank, or the largest.
  std::vector<float> target(labels.size(), 0), top(labels.size());
  for (std::size_t i = 0; i < labels.size(); ++i) {
    const auto* row = x.row(static_cast<Index>(i));
    if (const auto at = labels[i] - first; at >= 0 && at < columns) target[i] = row[at];
    top[i] = *std::max_element(row, row + columns);
  }
  tensor_.all_reduce_sum(target);
  tensor_.all_reduce_max(top);
  const auto smoothing = label_smoothing * static_cast<double>(columns) / static_cast<double>(columns - 1);
  for (std::size_t i = 0; i < out.size(); ++i) {
    const auto* row = x.row(static_cast<Index>(i));
    const auto loss = static_cast<double>(out[i]), behind = static_cast<double>(labels[i] >= 0 && labels[i] < limit ? target[i] : top[i]);
    const auto mean_log = std::accumulate(row, row + columns, 0.0) / static_cast<double>(columns) - (loss + behind);
    out[i] = static_cast<float>((1 - smoothing) * loss - smoothing * mean_log);
  }
  return out;
}

Tensor LanguageModule::mtp_layer(Weights& weights, Index depth, const Ids& ids, const Ids& positions, const Rope& rope, Index length, const Tensor& hidden) {
  const auto prefix = mtp_prefix(config_.mtp_repeated_layer ? 0 : depth);
  const auto embedded = embed(weights, ids, positions);
  const auto size = config_.hidden_size;
  auto both = on_.make(hidden.rows(), 2 * size);
  on_.normalize_into(embedded, norm_of(config_), parameters(weights, prefix + "enorm"), both, 0);
  on_.normalize_into(hidden, norm_of(config_), parameters(weights, prefix + "hnorm"), both, size);
  // Megatron gathers a column-parallel product here; every rank computes all of it instead.
  auto joined = on_.make(hidden.rows(), size);
  on_.linear(on_.pack(both), {weights.take(prefix + "eh_proj.weight"), {}}, joined);
  auto here = rank(weights);
  const auto branch = layer_forward(here, config_.mtp_layer(depth), prefix + "layer.", rope, length, joined);
  return on_.add_normalize(joined, branch, norm_of(config_), parameters(weights, prefix + "final_norm"));
}

Tensor LanguageModule::compute_mtp_single_step(Weights& weights, const MtpStep& step) {
  shard::require(step.depth >= 0 && step.depth < config_.mtp_num_layers, Code::Mismatch,
                 [&] { return fmt::format("mtp_step.{}: the model predicts {} tokens ahead", step.depth, config_.mtp_num_layers); });
  const auto rows = step.in_hidden.rows();
  shard::require(rows > 0 && static_cast<Index>(step.next_token_ids.size()) == rows && static_cast<Index>(step.position_ids.size()) == rows, Code::Mismatch,
                 [&] { return fmt::format("mtp_step.{}: {} rows of in_hidden, {} ids and {} positions; should be as many, and some", step.depth, rows, step.next_token_ids.size(), step.position_ids.size()); });
  // The method passes no rotary table; latent attention builds its own for rows 0 … N−1.
  const auto rope = config_.multi_latent_attention ? on_.rope(config_.rope, rows) : Rope{};
  return on_.recorded(fmt::format("mtp {} × {}", step.depth, rows), step.in_hidden, step.next_token_ids, step.position_ids,
                      [&](const Tensor& hidden, const Ids& ids, const Ids& positions) { return mtp_layer(weights, step.depth, ids, positions, rope, rows, hidden); });
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

void LanguageModule::note(const std::string& name, const Tensor& hidden, std::vector<Noted>& notes) const {
  if (tensor_.rank() == 0) notes.push_back({name, on_.stats(hidden)});
}

void LanguageModule::forward(Weights& weights, const ForwardRequest& request, ForwardResult& result, std::mutex& mutex) {
  const auto& batch = request.batch;
  setup_embeddings_and_output_layer();
  const auto rows = batch.batch * batch.length;
  std::vector<Noted> notes;
  auto ids = batch.input_ids, positions = batch.position_ids;
  Tensor hidden;
  if (placement_.pre_process) {
    hidden = embed(weights, on_.ids(ids), on_.ids(positions));
    note("embedding", hidden, notes);
  } else {
    hidden = on_.make(rows, config_.hidden_size);
    pipeline_.receive(placement_.pipeline_rank - 1, hidden);
  }
  const auto rope = on_.rope(config_.rope, batch.length), local = on_.rope(config_.rope_local, batch.length);
  for (Index l = placement_.first_layer; l < placement_.first_layer + placement_.layers; ++l) {
    const auto& layer = config_.layers[static_cast<std::size_t>(l)];
    auto here = rank(weights);
    on_.add(hidden, layer_forward(here, layer, layer_prefix(l), layer.local_rope ? local : rope, batch.length, hidden));
    note(fmt::format("layer {}", l), hidden, notes);
  }
  if (placement_.post_process) {
    std::vector<Tensor> states;
    states.push_back(final_norm(on_, config_, weights, "final_norm", hidden));
    note("final_norm", states.back(), notes);
    std::size_t before = 0;  // the state that the next depth starts from; steps lie between
    for (Index k = 0; request.mtp && k < config_.mtp_num_layers; ++k) {
      ids = roll_left(ids, batch.length);
      positions = roll_left(positions, batch.length);
      auto next = mtp_layer(weights, k, on_.ids(ids), on_.ids(positions), rope, batch.length, states[before]);
      note(fmt::format("mtp {}", k), next, notes);
      before = states.size();
      states.push_back(std::move(next));
      for (const auto& step : request.steps)
        if (step.depth == k) states.push_back(compute_mtp_single_step(weights, step));
    }
    head(weights, request, states, result, mutex);
  } else {
    pipeline_.send(placement_.pipeline_rank + 1, std::move(hidden));
  }
  std::vector<HiddenStats> seen;  // waits for the device, and so for other ranks: not under the lock
  for (const auto& note : notes) seen.push_back({note.stats(), note.name});
  on_.finish();
  const std::lock_guard lock(mutex);
  result.hidden.insert(result.hidden.end(), seen.begin(), seen.end());
}

void LanguageModule::head(Weights& weights, const ForwardRequest& request, const std::vector<Tensor>& states, ForwardResult& result, std::mutex& mutex) {
  // Losses over the stored, the true and the reference's vocabulary; where two are the same size, one serves both.
  std::vector<Index> limits{vocab_};
  std::vector<std::size_t> which{0};
  for (const auto limit : {request.true_vocab, request.reference_vocab}) {
    const auto known = std::find(limits.begin(), limits.end(), limit);
    which.push_back(static_cast<std::size_t>(known - limits.begin()));
    if (known == limits.end()) limits.push_back(limit);
  }
  // Order of `states`: the decoder, then for each depth its training state followed by its steps.
  struct Output {
    LogitsBlock::Of of;
    Index index;
    const Tensor* hidden;
    Packed packed;
    std::vector<std::unique_ptr<LossSum>> losses;
  };
  std::vector<Output> outputs;
  std::vector<std::vector<Index>> labels{request.batch.labels};
  const auto losses = [&](const std::vector<Index>& targets) {
    std::vector<std::unique_ptr<LossSum>> out;
    const auto ids = on_.ids(targets);
    for (const auto limit : limits) out.push_back(on_.cross_entropy(ids, limit));
    return out;
  };
  std::size_t at = 0;
  const auto output = [&](LogitsBlock::Of of, Index index, std::vector<std::unique_ptr<LossSum>> sums) {
    outputs.push_back({of, index, &states[at], on_.pack(states[at]), std::move(sums)});
    ++at;
  };
  output(LogitsBlock::Of::Main, 0, losses(labels[0]));
  for (Index k = 0; request.mtp && k < config_.mtp_num_layers; ++k) {
    labels.push_back(roll_left(labels.back(), request.batch.length));
    output(LogitsBlock::Of::Mtp, k, losses(labels.back()));
    for (std::size_t s = 0; s < request.steps.size(); ++s)
      if (request.steps[s].depth == k) output(LogitsBlock::Of::Step, static_cast<Index>(s), {});
  }
  const auto mine = vocabulary_share();
  for (const auto& [first, count] : head_blocks()) {
    const auto block = weights.take(head_name(), first);  // those of its rows that are this rank's
    const auto lo = std::max(first, mine.lo), hi = std::min(first + count, mine.lo + mine.count);
    if (lo >= hi) continue;
    const Linear rows{block.row_range(0, hi - lo), {}};
    for (auto& out : outputs) {
      auto logits = on_.make(out.hidden->rows(), hi - lo);
      on_.linear(out.packed, rows, logits);
      scale_logits(logits);
      for (auto& loss : out.losses) loss->add(logits, lo);
      if (!request.on_logits) continue;
      const auto seen = on_.to_host(logits);
      const std::lock_guard lock(mutex);
      request.on_logits({out.of, out.index, lo, seen});
    }
  }
  const auto seen = outputs[0].losses[which[1]]->seen();
  std::vector<std::vector<std::vector<float>>> found;
  for (auto& out : outputs) {
    auto& of_output = found.emplace_back();
    for (auto& loss : out.losses) of_output.push_back(loss->finish(tensor_));
  }
  std::vector<Tensor> step_hidden(request.steps.size());
  for (const auto& out : outputs)
    if (out.of == LogitsBlock::Of::Step) step_hidden[static_cast<std::size_t>(out.index)] = on_.to_host(*out.hidden);
  const std::lock_guard lock(mutex);
  result.peak_logit = std::max(result.peak_logit, seen.max_abs);
  result.nonfinite_logits += seen.nonfinite;
  if (tensor_.rank() != 0) return;
  result.mtp.resize(static_cast<std::size_t>(request.mtp ? config_.mtp_num_layers : 0));
  result.mtp_labels.assign(labels.begin() + 1, labels.end());
  result.step_hidden = std::move(step_hidden);
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    if (outputs[i].of == LogitsBlock::Of::Step) continue;
    (outputs[i].of == LogitsBlock::Of::Main ? result.main : result.mtp[static_cast<std::size_t>(outputs[i].index)]) = {found[i][which[0]], found[i][which[1]], found[i][which[2]]};
  }
}

}  // namespace lm
