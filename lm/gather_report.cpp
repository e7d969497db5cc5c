// Two rounds: everyone's parts, then rank 0's findings.
#include "lm/gather_report.h"

#include "libshard/fnv1a.h"
#include "lm/message.h"

#include <algorithm>

namespace lm {
namespace {

void write(MessageWriter& to, const ForwardResult& result) {
  std::vector<std::string> names;
  std::vector<TensorStats> stats;
  for (const auto& one : result.hidden) names.push_back(one.name), stats.push_back(one);
  to(names, stats, result.peak_logit, result.nonfinite_logits, result.main.all, result.main.limited, result.main.reference, result.mtp.size());
  for (const auto& losses : result.mtp) to(losses.all, losses.limited, losses.reference);
  to(result.mtp_labels, result.step_hidden.size());
  for (const auto& hidden : result.step_hidden) to(hidden.rows(), hidden.columns(), std::vector<float>(hidden.values().begin(), hidden.values().end()));
}

ForwardResult read(MessageReader& from) {
  ForwardResult out;
  std::vector<std::string> names;
  std::vector<TensorStats> stats;
  std::size_t depths = 0, steps = 0;
  from(names, stats, out.peak_logit, out.nonfinite_logits, out.main.all, out.main.limited, out.main.reference, depths);
  for (std::size_t i = 0; i < std::min(names.size(), stats.size()); ++i) out.hidden.push_back({stats[i], names[i]});
  for (; depths > 0; --depths) {
    auto& losses = out.mtp.emplace_back();
    from(losses.all, losses.limited, losses.reference);
  }
  from(out.mtp_labels, steps);
  for (; steps > 0; --steps) {
    Index rows = 0, columns = 0;
    std::vector<float> values;
    from(rows, columns, values);
    shard::require(rows >= 0 && columns >= 0 && shard::volume({rows, columns}) == static_cast<Index>(values.size()), shard::Code::Io, [] { return "ranks: a step's state has another size than it says"; });
    auto& hidden = out.step_hidden.emplace_back(rows, columns);
    std::copy(values.begin(), values.end(), hidden.values().begin());
  }
  return out;
}

}  // namespace

void agree(Processes& processes, const Ranks& ranks, const std::vector<StagePlan>& plans, const ForwardRequest& request) {
  MessageWriter mine;
  mine(ranks.tensor, ranks.pipeline, ranks.compute, request.batch.batch, request.batch.length, request.batch.input_ids, request.batch.labels, request.batch.position_ids, request.true_vocab,
       request.reference_vocab, request.mtp);
  for (const auto& step : request.steps) mine(step.depth, step.in_hidden.rows(), step.next_token_ids, step.position_ids);
  for (const auto& plan : plans)
    for (std::size_t u = 0; u < plan.uses.size(); ++u) {
      const auto& use = plan.uses[u];
      mine(use.name, use.lo, use.count, use.times, plan.readers[u]);
      for (const auto& parts : plan.parts)
        if (const auto part = parts.find(use.name); part != parts.end()) mine(part->second.type, part->second.box.lo, part->second.box.size);
    }
  const auto all = processes.all_gather(std::to_string(shard::fnv1a(std::as_bytes(std::span(mine.text())))));
  for (std::size_t r = 1; r < all.size(); ++r)
    shard::require(all[r] == all[0], shard::Code::Mismatch, [&] { return fmt::format("rank {}: would compute something else than rank 0; arguments or checkpoints differ", r); });
}

void gather_report(Processes& processes, const Ranks& ranks, WeightSource& source, const shard::Budget& budget, RunReport& report) {
  MessageWriter mine;
  write(mine, report.result);
  mine(report.load_seconds, source.bytes_read(), source.tell());
  const auto all = processes.all_gather(mine.text());
  report.result = {};
  std::uint64_t others_read = 0;
  for (int r = 0; r < processes.size(); ++r) {
    MessageReader from(all[static_cast<std::size_t>(r)]);
    auto part = read(from);
    double load_seconds = 0;
    std::uint64_t bytes_read = 0;
    std::string seen;
    from(load_seconds, bytes_read, seen);
    if (r != processes.rank()) source.hear(seen), others_read += bytes_read;
    report.load_seconds = std::max(report.load_seconds, load_seconds);
    auto& whole = report.result;
    whole.hidden.insert(whole.hidden.end(), part.hidden.begin(), part.hidden.end());
    whole.peak_logit = std::max(whole.peak_logit, part.peak_logit);
    whole.nonfinite_logits += part.nonfinite_logits;
    if (r != (ranks.pipeline - 1) * ranks.tensor) continue;
    whole.main = std::move(part.main);           // the first rank of the last stage has the losses
    whole.mtp = std::move(part.mtp);
    whole.mtp_labels = std::move(part.mtp_labels);
    whole.step_hidden = std::move(part.step_hidden);
  }
  MessageWriter found;
  if (processes.rank() == 0) {
    const auto findings = source.findings(budget);
    found(findings.size());
    for (const auto& one : findings) found(one.rule, one.severity, one.key, one.message);
    found(source.bytes_read() + others_read);
  }
  const auto told = processes.all_gather(found.text());
  MessageReader from(told[0]);
  std::size_t count = 0;
  from(count);
  for (; count > 0; --count) {
    auto& one = report.findings.emplace_back();
    from(one.rule, one.severity, one.key, one.message);
  }
  from(report.bytes_read);
  report.weights = source.stats();
}

}  // namespace lm
