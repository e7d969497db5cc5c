// shardkit validate: runs the model that a checkpoint describes and judges what comes out.
#include "cli/commands.h"
#include "cli/meeting.h"
#include "cli/model_device.h"
#include "cli/options.h"
#include "cli/report_files.h"
#include "cli/validate.h"
#include "formats/kernels.h"
#include "formats/model_config.h"
#include "libshard/error.h"
#include "libshard/inspectors.h"
#include "libshard/stop.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <set>

namespace cli {
namespace {

using shard::Code;
using shard::Finding;
using shard::Index;

double since(std::chrono::steady_clock::time_point start) { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(); }

struct Opened {
  formats::Checkpoint checkpoint;
  shard::TransformerConfig config;
  Index stored_vocab = 0, vocab = 0;
};

Opened open_model(const ValidateAsk& ask, const std::string& path, unsigned threads) {
  auto options = ask.model.open;
  options.threads = threads;
  options.dequantise = shard::DType::BF16;  // what transformers computes them as
  Opened out{formats::open(path, options), {}, 0, 0};
  refuse(out.checkpoint.findings);
  out.config = formats::model_config(out.checkpoint);
  const auto& table = out.checkpoint.logical.tensors.find("embedding.word.weight");
  shard::require(table != out.checkpoint.logical.tensors.end(), Code::Mismatch, [&] { return fmt::format("{}: holds no embedding.word.weight; a language model has one", path); });
  out.stored_vocab = table->second.natural.empty() ? 0 : table->second.natural[0];
  out.vocab = std::min(out.checkpoint.vocab.value_or(out.config.vocab_size ? out.config.vocab_size : out.stored_vocab), out.stored_vocab);
  shard::require(out.vocab > 0, Code::Mismatch, [&] { return fmt::format("{}: has a vocabulary of {}; should be positive", path, out.vocab); });
  return out;
}

/// Ids that look like nothing in particular, the same on every machine.
lm::Batch built_in_tokens(Index vocab, Index positions) {
  const auto length = std::clamp<Index>(positions, 2, 128);
  std::vector<Index> row;
  std::uint64_t state = 0x9e3779b97f4a7c15ull;
  for (Index i = 0; i <= length; ++i) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    row.push_back(static_cast<Index>(state % static_cast<std::uint64_t>(vocab)));
  }
  return batch_of({row}, "built-in tokens");
}

/// Copies of one tensor that a checkpoint stores several times must agree.
void refuse_differing_copies(const formats::Checkpoint& checkpoint, const shard::Budget& budget) {
  const formats::LocalReader reader(checkpoint.logical, checkpoint.files);
  shard::SummedSource source(reader, formats::kernels());
  std::vector<Finding> findings;
  shard::compare_copies(source, budget, findings);
  shard::refuse(findings);
}

/// Over labels in [0, limit) that were not rolled in from nowhere; nullopt where there are none.
std::optional<double> mean(const std::vector<float>& losses, const std::vector<Index>& labels, Index limit, Index length, Index rolled) {
  double sum = 0;
  std::size_t count = 0;
  for (std::size_t i = 0; i < losses.size(); ++i) {
    if (labels[i] < 0 || labels[i] >= limit || static_cast<Index>(i) % length + rolled >= length) continue;
    sum += static_cast<double>(losses[i]);
    ++count;
  }
  return count ? std::optional(sum / static_cast<double>(count)) : std::nullopt;
}

/// How far two correct forward passes lie apart grows with the largest logit: in f32 up to 5.3e-6 of it over 160 random models
/// of all families but GPT-OSS, whose random models reach 1.7e-5, and 2.2e-6 on trained ones. In bf16 one token may go to another expert and its logits anywhere, so that
/// means are judged there: up to 1.3e-2 of it on the same models, 3e-3 on trained ones. Fp8 is told from what it leaves of the model, up to 4.7e-2 of it on
/// random ones; another model's logits lie a quarter of it away.
double tolerance(lm::Compute compute, double peak) {
  switch (compute) {
    case lm::Compute::F32: return std::max(2e-5, 2e-5 * peak);
    case lm::Compute::Bf16: return std::max(0.02, 1.5e-2 * peak);
    default: return std::max(0.1, 0.1 * peak);
  }
}

void judge(Validation& v, const std::string& name, double value, double most) {
  v.checks.push_back({name, fmt::format("{:.2e}, at most {:.2e}", value, most), std::isfinite(most) && value <= most});
}

/// "0" of "mtp.0.logits" and "mtp_step.0.hidden", whatever number stands there.
std::set<std::string> depths_of(const Arrays& arrays) {
  std::set<std::string> out;
  for (const auto& entry : arrays.arrays)
    for (const std::string_view head : {"mtp.", "mtp_step."}) {
      if (!entry.first.starts_with(head)) continue;
      const auto end = entry.first.find_first_not_of("0123456789", head.size());
      if (end != head.size() && end != std::string::npos && entry.first[end] == '.') out.insert(entry.first.substr(head.size(), end - head.size()));
    }
  return out;
}

void judge_reference(Validation& v, const Comparer& compared, const Reference& reference, lm::Compute compute, Index stored_vocab) {
  const bool loss_fits = reference.vocab <= stored_vocab;
  const auto before = v.checks.size();
  if (!loss_fits) v.notes.push_back(fmt::format("the reference's loss runs over {} columns, {} are stored here; only logits are compared", reference.vocab, stored_vocab));
  const auto figures = [&](const std::string& name, const Comparer::Figures& f) {
    // The smaller one: one number that is out of bounds, here or there, must not widen what the others may differ by.
    const auto most = tolerance(compute, f.logits ? std::min(f.peak, f.wanted_peak) : v.peak_logit);
    if (compute == lm::Compute::F32) {
      if (f.logits) judge(v, name + " logits", f.max_abs_logits, most);
      if (f.loss && loss_fits) judge(v, name + " loss", f.max_abs_loss, most);
    } else {
      if (f.logits) judge(v, name + " logits, mean", f.mean_abs_logits(), most);
      if (f.loss && loss_fits) judge(v, name + " loss, mean", f.mean_abs_loss, most);
    }
  };
  figures("reference", compared.main);
  v.reference = compared.main;
  for (auto& m : v.mtp) {
    m.figures = compared.mtp[static_cast<std::size_t>(m.depth)];
    figures(fmt::format("reference mtp.{}", m.depth), *m.figures);
    for (std::size_t s = 0; s < reference.steps.size(); ++s)
      if (reference.steps[s].depth == m.depth) {
        m.step = compared.steps[s];
        const auto most = (compute == lm::Compute::F32 ? 1 : 4) * tolerance(compute, v.peak_logit);
        if (m.step->hidden) judge(v, fmt::format("reference mtp_step.{} hidden", m.depth), m.step->max_abs_hidden, most);
        if (m.step->logits) judge(v, fmt::format("reference mtp_step.{} logits", m.depth), m.step->max_abs_logits, most);
      }
  }
  for (const auto& depth : depths_of(reference.arrays))
    if (std::none_of(v.mtp.begin(), v.mtp.end(), [&](const auto& m) { return std::to_string(m.depth) == depth; }))
      v.checks.push_back({"reference mtp." + depth, fmt::format("the reference holds it; the model has {} MTP layers", v.mtp.size()), false});
  if (v.checks.size() == before) v.checks.push_back({"reference", "holds neither logits nor a loss that fits; nothing was compared", false});
}

/// run_model on a checkpoint whose files should stay as they were opened.
lm::RunReport run_on(const Opened& model, const lm::ForwardRequest& request, const lm::RunOptions& options, lm::Device& device) {
  const formats::LocalReader reader(model.checkpoint.logical, model.checkpoint.files);
  try {
    auto out = run_model(reader, formats::kernels(), model.config, request, options, device);
    model.checkpoint.files->refuse_changed();
    return out;
  } catch (const shard::Error& error) {
    if (error.code == Code::Io) model.checkpoint.files->refuse_changed();  // knows the file's folder, which the model does not
    throw;
  }
}

/// The rows that count of `one` beside `other`, whose size is taken where `one` does not know its own.
Index rows_beside(const Opened& one, const Opened& other) {
  const bool known = one.checkpoint.vocab || one.config.vocab_size;
  return known ? one.vocab : std::min(one.stored_vocab, other.vocab);
}

void judge_against(Validation& v, const ValidateAsk& ask, const Opened& model, const Opened& other, const lm::Batch& batch, const lm::RunReport& mine, const lm::RunOptions& options, lm::Device& device) {
  // Losses over the rows that one side has say nothing of the other's.
  if (const auto here = rows_beside(model, other), there = rows_beside(other, model); here != there)
    v.checks.push_back({"against " + ask.against + " vocabulary", fmt::format("{} tokens here, {} there", here, there), false});
  const std::vector<lm::MtpStep> none;
  const auto theirs = run_on(other, {batch, none, std::min(v.vocab, other.vocab), std::min(v.vocab, other.vocab), {}, true}, options, device);
  shard::refuse(theirs.findings);
  std::size_t different = 0, compared = 0;
  double most = 0;
  const auto compare = [&](const std::vector<float>& a, const std::vector<float>& b) {
    compared += a.size();
    for (std::size_t i = 0; i < a.size(); ++i)
      if (std::memcmp(&a[i], &b[i], sizeof a[i]) != 0) {
        ++different;
        most = std::max(most, distance(static_cast<double>(a[i]), static_cast<double>(b[i])));
      }
  };
  compare(mine.result.main.limited, theirs.result.main.limited);
  const auto depths = std::min(mine.result.mtp.size(), theirs.result.mtp.size());
  for (std::size_t k = 0; k < depths; ++k) compare(mine.result.mtp[k].limited, theirs.result.mtp[k].limited);
  if (mine.result.mtp.size() != theirs.result.mtp.size())
    v.checks.push_back({"against " + ask.against + " MTP", fmt::format("{} MTP layers here, {} there; --drop 'mtp.*' leaves them out", mine.result.mtp.size(), theirs.result.mtp.size()), false});
  std::string where;
  for (std::size_t i = 0; i < mine.result.hidden.size() && i < theirs.result.hidden.size(); ++i)
    if (mine.result.hidden[i].digest != theirs.result.hidden[i].digest) {
      where = fmt::format("; activations first part ways at {} (rms {:.6g} and {:.6g})", mine.result.hidden[i].name, mine.result.hidden[i].rms, theirs.result.hidden[i].rms);
      break;
    }
  if (different && where.empty()) where = "; activations are the same up to the head";
  v.checks.push_back({"against " + ask.against,
                      different ? fmt::format("{} of {} losses differ, by up to {:.2e}{}", different, compared, most, where) : fmt::format("{} losses are the same bits", compared),
                      different == 0});
}

/// Ids that no row stands for have no meaning; of a reference labels may be negative, which leaves them out as a loss mask would.
void check_ids(const std::string& input, const lm::Batch& batch, const std::optional<Reference>& reference, const Opened& model) {
  const auto vocab = reference ? model.stored_vocab : model.vocab;
  const auto check = [&](const std::string& what, const std::vector<Index>& ids, bool negative) {
    for (const auto id : ids) shard::require((id >= 0 || negative) && id < vocab, Code::Mismatch, [&] { return fmt::format("{}: {} {} is outside the vocabulary of {} of {}", input, what, id, vocab, model.checkpoint.path.string()); });
  };
  check("token", batch.input_ids, false);
  check(reference ? "label" : "token", batch.labels, reference.has_value());
  if (!reference) return;
  for (const auto& step : reference->steps) check(fmt::format("mtp_step.{}.next_token_ids", step.depth), step.next_token_ids, false);
}

/// What of it counts less than it may seem to.
void say_of_reference(Validation& v, const Reference& reference, const Opened& model) {
  const auto padding = std::count_if(reference.batch.labels.begin(), reference.batch.labels.end(), [&](Index id) { return id >= model.vocab; });
  if (padding) v.notes.push_back(fmt::format("{} labels of the reference are padding of the vocabulary of {}; the loss over the true vocabulary leaves them out", padding, model.vocab));
  const auto& positions = reference.batch.position_ids;
  bool counted = true;
  for (std::size_t i = 0; i < positions.size(); ++i) counted = counted && positions[i] == static_cast<Index>(i) % reference.batch.length;
  if (!counted && !model.checkpoint.logical.tensors.contains("embedding.position.weight"))
    v.notes.push_back("the reference's position_ids are not 0, 1, 2, …; rotary positions are, as Megatron counts them");
}

}  // namespace

void check_ask(const ValidateAsk& ask) {
  const int given = !ask.reference.empty() + !ask.tokens.empty() + !ask.text.empty();
  shard::require(given <= 1 && (ask.reference.empty() || ask.against.empty()), Code::Usage, [] { return "command line: give one of --reference, --tokens and --text; --against goes with tokens or text"; });
  shard::require(lm::compute_named(ask.compute).has_value(), Code::Usage, [&] { return fmt::format("--compute {}: f32, bf16 and fp8 are known", ask.compute); });
  shard::require(!ask.max_loss || !std::isnan(*ask.max_loss), Code::Usage, [] { return "--max-loss nan: is no bound"; });
}

Validation validate(const ValidateAsk& ask, const shard::Budget& budget, lm::Device& device, lm::Processes* processes) {
  const auto start = std::chrono::steady_clock::now();
  check_ask(ask);
  const auto model = open_model(ask, ask.path, budget.threads);
  std::optional<Opened> other;
  if (!ask.against.empty()) other = open_model(ask, ask.against, budget.threads);
  if (other) check_dropped(ask.model.open, {&model.checkpoint, &other->checkpoint});
  else check_dropped(ask.model.open, {&model.checkpoint});
  const auto& smaller = other && other->vocab < model.vocab ? *other : model;
  if (!processes || processes->rank() == 0) refuse_differing_copies(model.checkpoint, budget);

  Validation v;
  v.path = ask.path;
  v.family = model.checkpoint.family.empty() ? model.config.family : model.checkpoint.family;
  v.layout = model.checkpoint.parallel;
  v.compute = ask.compute;
  v.device = device.name();
  v.tp = ask.tp;
  v.pp = ask.pp;
  v.vocab = model.vocab;
  v.notes = model.config.notes;
  if (ask.model.open.vocab && model.config.vocab_size != model.vocab) v.notes.push_back(fmt::format("--vocab-size {} is followed; config.json says {}", model.vocab, model.config.vocab_size));

  std::optional<Reference> reference;
  lm::Batch batch;
  if (!ask.reference.empty()) {
    reference = read_reference(ask.reference, model.config.hidden_size);
    batch = reference->batch;
    v.input = ask.reference;
  } else if (!ask.tokens.empty()) {
    batch = read_tokens(ask.tokens);
    v.input = ask.tokens;
  } else if (!ask.text.empty()) {
    batch = read_text_tokens(ask.text, model.checkpoint, model.config.max_position_embeddings, budget.stop);
    v.input = ask.text;
  } else {
    batch = built_in_tokens(smaller.vocab, model.config.max_position_embeddings);
    v.input = "built-in pseudo-random tokens";
  }
  check_ids(v.input, batch, reference, smaller);
  if (reference) say_of_reference(v, *reference, model);

  const lm::RunOptions options{*lm::compute_named(ask.compute), ask.tp, ask.pp, budget.threads, budget.memory, budget.stop, processes};
  std::optional<Comparer> comparer;
  if (reference) comparer.emplace(*reference, model.config.mtp_num_layers);
  static const std::vector<lm::MtpStep> kNone;
  const auto reference_vocab = reference && reference->vocab ? std::min(reference->vocab, model.stored_vocab) : model.stored_vocab;
  lm::ForwardRequest request{batch, reference ? reference->steps : kNone, model.vocab, reference_vocab, {}, true};
  if (comparer) request.on_logits = [&](const lm::LogitsBlock& block) { comparer->on_logits(block); };
  v.load_seconds = since(start);
  const auto report = run_on(model, request, options, device);
  for (auto& note : device.notes()) v.notes.push_back(std::move(note));
  v.load_seconds += report.load_seconds;
  v.forward_seconds = report.seconds - report.load_seconds;
  v.bytes_read = report.bytes_read;
  for (const auto& finding : report.findings)
    if (finding.rule == "checksum") shard::refuse({finding});
  v.findings = model.checkpoint.findings;  // none is an error: open_model refuses those
  if (other)
    for (auto finding : other->checkpoint.findings) {
      finding.message = fmt::format("{}: {}", ask.against, finding.message);
      v.findings.push_back(std::move(finding));
    }
  v.findings.insert(v.findings.end(), report.findings.begin(), report.findings.end());
  v.weights = report.weights;
  for (auto& finding : lm::norm_outliers(v.weights)) v.findings.push_back(std::move(finding));

  const auto& result = report.result;
  v.tokens = batch.batch * batch.length;
  v.loss = mean(result.main.all, batch.labels, model.stored_vocab, batch.length, 0).value_or(NAN);
  v.loss_true_vocab = mean(result.main.limited, batch.labels, model.vocab, batch.length, 0).value_or(NAN);
  for (std::size_t i = 0; i < result.main.limited.size(); ++i)
    if (batch.labels[i] >= 0 && batch.labels[i] < model.vocab) v.token_loss.push_back(result.main.limited[i]);
  v.peak_logit = result.peak_logit;
  v.hidden = result.hidden;
  v.pipeline = shard::place_layers(v.layout.value_or(shard::Parallel()), model.config.num_layers, model.config.mtp_num_layers);
  v.tied = model.config.tied;
  bool finite = result.nonfinite_logits == 0 && std::isfinite(v.loss);
  for (std::size_t k = 0; k < result.mtp.size(); ++k) {
    const auto of_tokens = mean(result.mtp[k].all, result.mtp_labels[k], model.stored_vocab, batch.length, static_cast<Index>(k) + 1);
    if (!of_tokens) v.notes.push_back(fmt::format("MTP depth {}: no label lies that far ahead; its loss is not known", k));
    const auto loss = of_tokens.value_or(NAN);
    v.mtp.push_back({static_cast<Index>(k), loss, loss * model.config.mtp_loss_scaling_factor / static_cast<double>(model.config.mtp_num_layers), std::nullopt, std::nullopt});
    finite = finite && (!of_tokens || std::isfinite(loss));
  }
  std::string first_bad;
  for (const auto& stats : result.hidden)
    if (stats.nonfinite && first_bad.empty()) first_bad = fmt::format("{} has {} numbers that are not finite", stats.name, stats.nonfinite);
  v.checks.push_back({"finite", finite ? "losses and logits are finite" : !first_bad.empty() ? first_bad : result.nonfinite_logits ? fmt::format("{} logits are not finite", result.nonfinite_logits) : "a loss is not finite", finite});
  if (comparer) {
    if (processes) {
      const auto all = processes->all_gather(comparer->tell());
      for (int r = 0; r < processes->size(); ++r)
        if (r != processes->rank()) comparer->hear(all[static_cast<std::size_t>(r)]);
    }
    comparer->finish(result);
    const auto exactness = options.compute == lm::Compute::F32 && device.tf32() ? lm::Compute::Bf16 : options.compute;
    judge_reference(v, *comparer, *reference, exactness, model.stored_vocab);
  }
  if (!ask.text.empty()) {
    const auto chance = std::log(static_cast<double>(model.vocab));
    v.checks.push_back({"better than chance", fmt::format("{:.6f} on this text; ln {} is {:.6f}", v.loss_true_vocab, model.vocab, chance), v.loss_true_vocab < chance});
  }
  if (ask.max_loss) v.checks.push_back({"max loss", fmt::format("{:.6f}, at most {:g}", v.loss_true_vocab, *ask.max_loss), v.loss_true_vocab <= *ask.max_loss});
  if (other) judge_against(v, ask, model, *other, batch, report, options, device);
  v.all_seconds = since(start);
  return v;
}

namespace {

std::vector<ReportFile> reports_of(const ValidateAsk& ask) { return {{"--html", ask.html}, {"--junit", ask.junit}}; }

int tell(const ValidateAsk& ask, Validation& v, const std::string& why) {
  if (ask.run.device == "auto") v.notes.push_back(fmt::format("device {}: {}", v.device, why));
  if (ask.run.json) print_json(validation_json(v));
  else if (!ask.run.quiet || !v.ok()) print_validation(v);
  if (!ask.html.empty()) write_validation_html(ask.html, v);
  if (!ask.junit.empty()) write_validation_junit(ask.junit, v);
  return v.ok() ? 0 : 1;
}

/// As one rank of several processes, of which rank 0 tells.
int run_together(const ValidateAsk& ask, const ranks::Launch& launch) {
  shard::require(ask.tp * ask.pp == launch.size, Code::Usage,
                 [&] { return fmt::format("--tp {} --pp {}: are {} ranks; {}={} processes were started (without it one process runs all ranks)", ask.tp, ask.pp, ask.tp * ask.pp, launch.from, launch.size); });
  ModelDevice where;                           // outlives the meeting, whose failure it hears of
  Meeting meeting(launch, ask.path, ask.run.quiet);
  return meeting.run([&] {
    if (meeting.rank() == 0) require_writable(reports_of(ask), ask.path);
    where = model_device(ask.run, ask.choice, meeting.local_rank());
    meeting.on_failure([&] { where.device->fail(); }, std::chrono::seconds(10));
    auto v = validate(ask, ask.run.limits(), *where.device, &meeting);
    const auto status = meeting.rank() == 0 ? tell(ask, v, where.why) : v.ok() ? 0 : 1;
    meeting.finish();
    return status;
  });
}

int run_validate(const ValidateAsk& ask) {
  if (const auto launch = ranks::launch_of(environment())) return run_together(ask, *launch);
  require_writable(reports_of(ask), ask.path);
  auto where = model_device(ask.run, ask.choice);
  auto v = [&] {
    try {
      return validate(ask, ask.run.limits(), *where.device);
    } catch (const shard::Error& error) {
      // "auto" leaves the choice: what does not fit the device is computed here, unless it was asked for what only devices have.
      if (error.code != Code::Device || ask.run.device != "auto" || ask.choice.attention != "auto" || ask.choice.tf32) throw;
      where = {lm::host_device(), fmt::format("auto: {}", error.what())};
      return validate(ask, ask.run.limits(), *where.device);
    }
  }();
  return tell(ask, v, where.why);
}

}  // namespace

void add_validate(CLI::App& app, Action& action) {
  auto ask = std::make_shared<ValidateAsk>();
  auto* command = app.add_subcommand("validate", "Run the model and judge its logits and losses");
  command->add_option("CKPT", ask->path, "Checkpoint folder or file")->required();
  command->add_option("--reference", ask->reference, "Inputs with the logits and losses that should come out (safetensors)")->type_name("FILE");
  command->add_option("--against", ask->against, "Another checkpoint that should compute the same bits")->type_name("CKPT");
  command->add_option("--tokens", ask->tokens, "Token ids: text, .npy or safetensors, [n] or [b,n]")->type_name("FILE");
  command->add_option("--text", ask->text, "Text for the checkpoint's tokenizer.json")->type_name("FILE");
  command->add_option("--tp", ask->tp, "Tensor parallel ranks, as threads or, where a launcher started several, as processes (default 1)");
  command->add_option("--pp", ask->pp, "Pipeline stages, likewise (default 1)");
  command->add_option("--compute", ask->compute, "f32, bf16 or fp8 (default f32)");
  ask->choice.add_to(*command);
  command->add_option("--max-loss", ask->max_loss, "Fail above this mean loss");
  command->add_option("--html", ask->html, "Write a report as one HTML page")->type_name("FILE");
  command->add_option("--junit", ask->junit, "Write the checks as JUnit XML")->type_name("FILE");
  ask->model.add_to(*command);
  ask->run.add_to(*command);
  command->callback([ask, &action] { action = [ask] { return run_validate(*ask); }; });
}

}  // namespace cli
