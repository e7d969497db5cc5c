// shardkit diff: where two checkpoints differ, across formats and layouts.
#include "cli/commands.h"
#include "cli/markup.h"
#include "cli/options.h"
#include "cli/print.h"
#include "cli/warn.h"
#include "formats/hash.h"
#include "formats/kernels.h"
#include "libshard/error.h"
#include "libshard/hints.h"
#include "libshard/inspectors.h"

namespace cli {
namespace {

struct DiffAsk {
  std::string a, b;
  double atol = 0, rtol = 0;
  ModelOptions model;
  RunOptions run;
};

struct Result {
  std::vector<std::string> only_in_a, only_in_b;
  std::vector<shard::TensorDifference> different;
  std::map<std::string, std::string> hints;  ///< by key: the known mistake that explains it
  bool same() const { return only_in_a.empty() && only_in_b.empty() && different.empty(); }
};

shard::Shape index_of(const formats::Checkpoint& a, const shard::TensorDifference& one) {
  return shard::unravel(static_cast<shard::Index>(one.difference.first), a.logical.tensors.at(one.key).natural);
}

Result compare(const DiffAsk& ask, const formats::Checkpoint& a, const formats::Checkpoint& b, const shard::Budget& budget) {
  Result out;
  for (const auto& [key, tensor] : a.logical.tensors)
    if (!b.logical.tensors.contains(key)) out.only_in_a.push_back(key);
  for (const auto& [key, tensor] : b.logical.tensors)
    if (!a.logical.tensors.contains(key)) out.only_in_b.push_back(key);
  const formats::LocalReader left(a.logical, a.files), right(b.logical, b.files);
  std::vector<shard::Finding> findings;
  ProgressBar bar("comparing", ask.run.quiet || ask.run.json);
  // Each side by its own size: rows that only one has are a difference.
  const auto vocab_a = a.vocab ? a.vocab : b.vocab, vocab_b = b.vocab ? b.vocab : a.vocab;
  out.different = diff_tensors(left, vocab_a, right, vocab_b, formats::kernels(), budget, findings, bar.callback());
  bar.clear();
  refuse(findings);
  std::erase_if(out.different, [&](const auto& one) {
    const bool close = one.difference.max_abs <= ask.atol || one.difference.max_rel <= ask.rtol;
    return one.note.empty() && (ask.atol > 0 || ask.rtol > 0) && close;
  });
  if (!out.same()) {
    auto params = a.params;
    params.insert(b.params.begin(), b.params.end());
    out.hints = explain({left, vocab_a}, {right, vocab_b}, out.different, params, formats::hash_bytes, formats::kernels(), budget);
  }
  return out;
}

/// What stands in another type or shape, and the known mistake; "" where there is neither.
std::string hint_of(const Result& result, const shard::TensorDifference& one) {
  const auto found = result.hints.find(one.key);
  if (found == result.hints.end()) return one.note;
  return one.note.empty() ? found->second : fmt::format("{}: {}", one.note, found->second);
}

/// Hints for keys that only one side holds.
Json other_hints(const Result& result) {
  auto out = Json::object();
  for (const auto* keys : {&result.only_in_a, &result.only_in_b})
    for (const auto& key : *keys)
      if (const auto found = result.hints.find(key); found != result.hints.end()) out[key] = found->second;
  return out;
}

void print_result(const DiffAsk& ask, const formats::Checkpoint& a, const Result& result) {
  const auto only = [&](const std::string& where, const std::vector<std::string>& keys) {
    for (const auto& key : keys) {
      const auto hint = result.hints.find(key);
      print_line(fmt::format("only in {}: {}{}", where, key, hint == result.hints.end() ? "" : fmt::format("  ({})", hint->second)));
    }
  };
  only(ask.a, result.only_in_a);
  only(ask.b, result.only_in_b);
  std::vector<std::vector<std::string>> rows;
  if (!result.different.empty()) rows.push_back({"KEY", "DIFFER", "MAX ABS", "MAX REL", "MAX ULP", "FIRST", "HINT"});
  for (const auto& one : result.different) {
    const auto& d = one.difference;
    if (!one.note.empty()) rows.push_back({one.key, "all", "", "", "", ""});
    else rows.push_back({one.key, std::to_string(d.count), fmt::format("{:.3g}", d.max_abs), fmt::format("{:.3g}", d.max_rel), std::to_string(d.max_ulp), shard::to_string(index_of(a, one))});
    if (auto hint = hint_of(result, one); !hint.empty()) rows.back().push_back(std::move(hint));
  }
  print_table(rows);
  if (result.same()) fmt::print("same: {} tensors\n", a.logical.tensors.size());
}

int run_diff(const DiffAsk& ask) {
  const auto budget = ask.run.budget();
  auto options = ask.model.open;
  options.threads = budget.threads;
  const auto a = formats::open(ask.a, options), b = formats::open(ask.b, options);
  refuse(a.findings);
  refuse(b.findings);
  warn_of(a.findings);
  warn_of(b.findings);
  check_dropped(options, {&a, &b});
  shard::require(!a.logical.tensors.empty() || !b.logical.tensors.empty(), shard::Code::Mismatch, [&] { return fmt::format("{} and {}: hold no tensors to compare", ask.a, ask.b); });
  const auto result = compare(ask, a, b, budget);
  const auto notes = vocabulary_notes({&a, &b});
  if (ask.run.json) {
    auto different = Json::array();
    for (const auto& one : result.different) {
      const auto& d = one.difference;
      const auto hint = hint_of(result, one);
      different.push_back({{"key", one.key}, {"count", d.count}, {"max_abs", d.max_abs}, {"max_rel", d.max_rel}, {"max_ulp", d.max_ulp},
                           {"first", one.note.empty() ? Json(index_of(a, one)) : Json::array()}, {"hint", hint.empty() ? Json(nullptr) : Json(hint)}});
    }
    Json out{{"same", result.same()}, {"only_in_a", result.only_in_a}, {"only_in_b", result.only_in_b}, {"different", different}};
    if (const auto others = other_hints(result); !others.empty()) out["hints"] = others;
    if (!notes.empty()) out["notes"] = notes;
    print_json(out);
  } else if (!ask.run.quiet) {
    print_result(ask, a, result);
    for (const auto& note : notes) fmt::print(stderr, "note: {}\n", one_line(note));
  }
  return result.same() ? 0 : 1;
}

}  // namespace

void add_diff(CLI::App& app, Action& action) {
  auto ask = std::make_shared<DiffAsk>();
  auto* command = app.add_subcommand("diff", "Where two checkpoints differ, across formats and layouts");
  command->add_option("A", ask->a, "Checkpoint")->required();
  command->add_option("B", ask->b, "Checkpoint")->required();
  command->add_option("--atol", ask->atol, "Tolerate tensors whose largest difference is at most this")->check(tolerance_check);
  command->add_option("--rtol", ask->rtol, "Tolerate tensors whose largest relative difference is at most this")->check(tolerance_check);
  ask->model.add_to(*command);
  ask->run.add_to(*command);
  command->callback([ask, &action] { action = [ask] { return run_diff(*ask); }; });
}

}  // namespace cli
