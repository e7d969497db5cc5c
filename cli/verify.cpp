// shardkit verify: every way in which a checkpoint can contradict itself, as findings.
#include "cli/commands.h"
#include "cli/device.h"
#include "cli/junit.h"
#include "cli/options.h"
#include "cli/print.h"
#include "cli/receipt.h"
#include "cli/report_files.h"
#include "formats/hf/quantised.h"
#include "formats/kernels.h"
#include "formats/torch_dcp/reader.h"
#include "formats/torch_save.h"
#include "gpu/reshard/scan.h"
#include "libshard/error.h"
#include "libshard/inspectors.h"
#include "libshard/source.h"
#include "libshard/stop.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <set>

namespace cli {
namespace {

using shard::Finding;

constexpr const char* kRules[] = {"coverage", "overlap", "replica", "tie", "nonfinite", "shape", "dtype", "missing",
                                  "unexpected", "padding", "checksum", "rank", "unverifiable"};

struct VerifyAsk {
  std::string path, against, receipt, junit;
  ModelOptions model;
  RunOptions run;
};

struct Result {
  std::vector<Finding> findings;
  std::map<std::string, std::uint64_t> checked;
  std::string storage;  ///< how bytes came to a device; "" on the CPU
  bool ok() const {
    return std::none_of(findings.begin(), findings.end(), [](const Finding& f) { return f.severity == Finding::Severity::Error; });
  }
};

/// Tensors whose items turned out to be of another type or shape cannot be read by the shape that metadata gives.
shard::ShardedStateDict readable(shard::ShardedStateDict dict, const std::vector<Finding>& findings) {
  for (const auto& finding : findings)
    if (finding.rule == "dtype" || finding.rule == "shape") dict.tensors.erase(finding.key);
  return dict;
}

void note_unverifiable(const formats::Checkpoint& checkpoint, bool replicas_compared, bool ties_compared, std::uint64_t sums, Result& out) {
  const auto note = [&](const char* key, std::string message) { out.findings.push_back({"unverifiable", Finding::Severity::Note, key, std::move(message)}); };
  if ((checkpoint.format == "torch_dist" || checkpoint.format == "dcp") && !replicas_compared) note("replicas", "this format stores one copy of every element; replicas cannot be compared");
  if (checkpoint.tied.value_or(false) && !ties_compared) note("output.weight", "tied to the embedding and stored once; there is no second copy to compare");
  if (sums == 0 && !checkpoint.stored.streams.empty() && checkpoint.format != "hdf5") note("checksums", "this format records no checksums");
  if (checkpoint.megatron && !checkpoint.vocab) note("vocabulary", "args do not say the true vocabulary size; padding rows are taken for tokens");
}

/// What files recorded of bytes that no tensor names: optimizer states, extra states, and the torch files beside the weights.
class Rest {
 public:
  Rest(const formats::Checkpoint& checkpoint, const shard::ShardedStateDict& stored, std::vector<Finding>& findings) {
    std::set<std::uint32_t> known;
    for (const auto& [key, tensor] : stored.tensors)
      for (const auto& shard : tensor.shards) known.insert(shard.place.stream);
    parts_.push_back({stored, checkpoint.files, std::move(known)});
    for (const auto& name : checkpoint.optimizer_files) try {
        const auto path = formats::inside(checkpoint.folder, name);
        parts_.push_back({formats::summed_records(path, name), std::make_shared<formats::FilePool>(std::vector{path}), {}});
        beside_ += parts_.back().dict.streams.size();
      } catch (const shard::Error& error) {
        findings.push_back({"checksum", Finding::Severity::Error, name, error.what()});
      }
    for (const auto& part : parts_)
      for (std::uint32_t s = 0; s < part.dict.streams.size(); ++s)
        if (part.has(s) && part.dict.streams[s].crc32) bytes_ += part.dict.streams[s].size;
  }

  void sum(const shard::Budget& budget, const shard::Progress& tell, std::vector<Finding>& findings) const {
    std::uint64_t before = 0;
    for (const auto& part : parts_) {
      const formats::LocalReader reader(part.dict, part.files);
      shard::SummedSource source(reader, formats::kernels());
      for (std::uint32_t s = 0; s < part.dict.streams.size(); ++s)
        if (part.has(s)) source.touch(s, part.dict.files[part.dict.streams[s].file]);
      source.finish(budget, findings, [&](std::uint64_t done, std::uint64_t) {
        if (tell) tell(before + done, bytes_);
      });
      before += source.bytes_read();
    }
  }

  std::uint64_t bytes() const { return bytes_; }
  /// Records of files beside the weights.
  std::uint64_t beside() const { return beside_; }

 private:
  struct Part {
    shard::ShardedStateDict dict;
    std::shared_ptr<const formats::FilePool> files;
    std::set<std::uint32_t> known;  ///< streams that tensors name
    bool has(std::uint32_t stream) const { return !known.contains(stream) && dict.streams[stream].file < dict.files.size(); }
  };

  std::vector<Part> parts_;
  std::uint64_t bytes_ = 0, beside_ = 0;
};

/// Megatron never sets what lies between the parameters of an optimizer's bucket: it saves what memory happened to hold.
void excuse_padding(const formats::Checkpoint& checkpoint, std::vector<Finding>& findings) {
  for (auto& finding : findings) {
    if (finding.rule != "nonfinite" || !checkpoint.optimizer.contains(finding.key) || finding.key.find(".bucket_idx_") == std::string::npos) continue;
    finding.severity = Finding::Severity::Warning;
    finding.message += "; a bucket's padding, which is never set, may hold such numbers";
  }
}

Result check(const VerifyAsk& ask, const Device& device, const formats::Checkpoint& checkpoint, const shard::Budget& budget) {
  Result out{checkpoint.findings, {}, ""};
  const bool only_bytes = checkpoint.format == "dcp" && !checkpoint.stored.objects.empty();  // of anything that pickles
  if (checkpoint.stored.tensors.empty() && !only_bytes) out.findings.push_back({"missing", Finding::Severity::Error, "", "no tensors are there at all"});
  const auto stored = readable(checkpoint.stored, checkpoint.findings);
  auto logical = readable(checkpoint.logical, checkpoint.findings);
  const auto replicas = compare_replicas(logical);
  auto described = checkpoint.logical;
  const formats::LocalReader reader(described, checkpoint.files);
  ProgressBar bar("verifying", ask.run.quiet || ask.run.json);
  const Rest rest(checkpoint, stored, out.findings);
  const auto draw = bar.callback();
  std::atomic<std::uint64_t> scanned = 0;  // of one bar's two parts
  shard::Progress first, second;
  if (draw) {
    first = [&](std::uint64_t done, std::uint64_t all) { draw(done, (scanned = all) + rest.bytes()); };
    second = [&](std::uint64_t done, std::uint64_t all) { draw(scanned + done, scanned + all); };
  }
  gpu::reshard::ScanOutcome found;
  if (!device.cuda.empty()) found = gpu::reshard::scan_bytes(reader, stored, replicas, formats::kernels(), budget, {device.cuda, ask.run.device_limit()}, first);
  else found.findings = scan_bytes(reader, stored, replicas, formats::kernels(), budget, first);
  excuse_padding(checkpoint, found.findings);
  for (const auto& object : checkpoint.stored.objects) {
    shard::refuse_stopped(budget.stop);
    if (const auto damaged = formats::torch_dcp::check_object(checkpoint, object)) found.findings.push_back(*damaged);
  }
  rest.sum(budget, second, found.findings);
  bar.clear();
  out.storage = found.storage;
  out.findings.insert(out.findings.end(), found.findings.begin(), found.findings.end());
  for (auto& finding : formats::hf::scale_findings(checkpoint)) out.findings.push_back(std::move(finding));
  const auto ties = static_cast<std::uint64_t>(std::count_if(replicas.comparisons.begin(), replicas.comparisons.end(), [](const auto& c) { return c.tie; }));
  std::uint64_t sums = 0, floating = 0;
  for (const auto& stream : checkpoint.stored.streams) sums += stream.crc32.has_value();
  for (const auto& [key, tensor] : stored.tensors) floating += is_floating(tensor.dtype);
  const auto tensors = checkpoint.stored.tensors.size();
  out.checked = {{"coverage", tensors}, {"overlap", tensors}, {"replica", replicas.comparisons.size() - ties}, {"tie", ties}, {"nonfinite", floating},
                 {"shape", tensors}, {"dtype", tensors}, {"missing", checkpoint.logical.tensors.size()}, {"unexpected", tensors},
                 {"padding", checkpoint.megatron ? 1u : 0u}, {"checksum", sums + rest.beside()}, {"rank", checkpoint.format == "mp_rank" ? checkpoint.stored.files.size() : 0}};
  note_unverifiable(checkpoint, replicas.comparisons.size() > ties, ties > 0, sums, out);
  return out;
}

bool known(const std::vector<Finding>& findings, const Finding& one) {
  return std::any_of(findings.begin(), findings.end(), [&](const Finding& f) { return f.rule == one.rule && f.key == one.key && f.message == one.message; });
}

void compare_with(const VerifyAsk& ask, const formats::Checkpoint& checkpoint, const shard::Budget& budget, Result& out) {
  auto options = ask.model.open;
  options.threads = budget.threads;
  const auto other = formats::open(ask.against, options);
  refuse(other.findings);
  check_dropped(options, {&checkpoint, &other});
  for (auto finding : other.findings) {
    finding.message = fmt::format("{}: {}", ask.against, finding.message);
    out.findings.push_back(std::move(finding));
  }
  for (auto& note : vocabulary_notes({&checkpoint, &other})) out.findings.push_back({"unverifiable", Finding::Severity::Note, "vocabulary", std::move(note)});
  const formats::LocalReader a(checkpoint.logical, checkpoint.files), b(other.logical, other.files);
  const auto vocab_a = checkpoint.vocab ? checkpoint.vocab : other.vocab, vocab_b = other.vocab ? other.vocab : checkpoint.vocab;
  std::vector<Finding> found;
  const auto differences = diff_tensors(a, vocab_a, b, vocab_b, formats::kernels(), budget, found);
  for (auto& finding : found) {
    if (known(out.findings, finding)) continue;  // what is wrong with the first one was told
    finding.message = fmt::format("{}: {}", ask.against, finding.message);
    out.findings.push_back(std::move(finding));
  }
  for (const auto& difference : differences)
    out.findings.push_back({difference.note.empty() ? "replica" : "shape", Finding::Severity::Error, difference.key,
                            difference.note.empty() ? fmt::format("differs from {} in {} elements, by up to {} ULP", ask.against, difference.difference.count, difference.difference.max_ulp)
                                                    : difference.note});
  for (const auto& [key, tensor] : checkpoint.logical.tensors)
    if (!other.logical.tensors.contains(key)) out.findings.push_back({"unexpected", Finding::Severity::Error, key, fmt::format("{} does not hold it", ask.against)});
  for (const auto& [key, tensor] : other.logical.tensors)
    if (!checkpoint.logical.tensors.contains(key)) out.findings.push_back({"missing", Finding::Severity::Error, key, fmt::format("{} holds it", ask.against)});
}

int run_verify(const VerifyAsk& ask) {
  require_writable({{"--junit", ask.junit}}, ask.path);
  const auto device = choose_device(ask.run.device);
  const auto budget = ask.run.limits();
  auto options = ask.model.open;
  options.threads = budget.threads;
  const auto receipt = ask.receipt.empty() ? std::nullopt : std::optional(read_receipt(ask.receipt));
  const auto checkpoint = formats::open(ask.path, options);
  if (ask.against.empty()) check_dropped(options, {&checkpoint});
  auto result = check(ask, device, checkpoint, budget);
  if (!ask.against.empty()) compare_with(ask, checkpoint, budget, result);
  if (receipt) {
    const auto found = check_receipt(*receipt, checkpoint, budget, ask.run.quiet || ask.run.json);
    result.findings.insert(result.findings.end(), found.begin(), found.end());
    result.checked["checksum"] += receipt->files.size() + receipt->tensors.size();
  }
  if (ask.run.json) {
    Json out{{"ok", result.ok()}, {"findings", findings_json(result.findings)}, {"checked", result.checked}, {"device", device.name}, {"device_why", device.why}};
    if (!device.cuda.empty()) out["device_use"] = {{"model", device.model}, {"storage", result.storage}};
    print_json(out);
  } else if (!ask.run.quiet || !result.ok()) {
    print_findings(result.findings);
    if (!ask.run.quiet) {
      std::string counts;
      for (const auto& [rule, count] : result.checked)
        if (count) counts += fmt::format("{}{} {}", counts.empty() ? "" : ", ", count, rule);
      print_line(fmt::format("{}: {} (checked: {})", ask.path, result.ok() ? "sound" : "NOT sound", counts));
    }
  }
  if (ask.run.verbose && !ask.run.json) fmt::print(stderr, "device: {} ({}){}{}\n", device.name, device.why, device.cuda.empty() ? "" : "; storage: ", result.storage);
  if (!ask.junit.empty()) write_junit(ask.junit, "shardkit.verify", fmt::format("shardkit verify {}", ask.path), kRules, result.findings);
  return result.ok() ? 0 : 1;
}

}  // namespace

void add_verify(CLI::App& app, Action& action) {
  auto ask = std::make_shared<VerifyAsk>();
  auto* command = app.add_subcommand("verify", "Is a checkpoint whole and consistent?");
  command->add_option("CKPT", ask->path, "Checkpoint folder or file")->required();
  command->add_option("--against", ask->against, "Another checkpoint that should hold the same weights")->type_name("CKPT");
  command->add_option("--receipt", ask->receipt, "What a conversion's --report wrote: checks its output without the source")->type_name("FILE");
  command->add_option("--junit", ask->junit, "Write the findings as JUnit XML")->type_name("FILE");
  ask->model.add_to(*command);
  ask->run.add_to(*command);
  command->callback([ask, &action] { action = [ask] { return run_verify(*ask); }; });
}

}  // namespace cli
