// shardkit hash: digests that do not depend on format or layout.
#include "cli/commands.h"
#include "cli/options.h"
#include "cli/print.h"
#include "cli/warn.h"
#include "formats/hash.h"
#include "formats/kernels.h"
#include "libshard/error.h"

namespace cli {
namespace {

struct HashAsk {
  std::string path;
  ModelOptions model;
  RunOptions run;
};

int run_hash(const HashAsk& ask) {
  const auto budget = ask.run.budget();
  auto options = ask.model.open;
  options.threads = budget.threads;
  const auto checkpoint = formats::open(ask.path, options);
  refuse(checkpoint.findings);
  check_dropped(options, {&checkpoint});
  warn_of(checkpoint.findings);
  const formats::LocalReader reader(checkpoint.logical, checkpoint.files);
  ProgressBar bar("hashing", ask.run.quiet || ask.run.json);
  std::vector<shard::Finding> findings;
  const auto digests = digest_tensors(reader, checkpoint.vocab, formats::hash_bytes, formats::kernels(), budget, findings, bar.callback());
  bar.clear();
  refuse(findings);
  const auto model = formats::hex(formats::combine(digests));
  if (ask.run.json) {
    Json tensors = Json::object();
    for (const auto& [key, digest] : digests) tensors[key] = formats::hex(digest);
    print_json({{"algorithm", formats::kHashAlgorithm}, {"model", model}, {"tensors", tensors}});
    return 0;
  }
  if (!ask.run.quiet)
    for (const auto& [key, digest] : digests) print_line(fmt::format("{}  {}", formats::hex(digest), key));
  print_line(fmt::format("{}  {}", model, ask.run.quiet ? ask.path : "(model)"));
  return 0;
}

}  // namespace

void add_hash(CLI::App& app, Action& action) {
  auto ask = std::make_shared<HashAsk>();
  auto* command = app.add_subcommand("hash", "Layout-free digests");
  command->add_option("CKPT", ask->path, "Checkpoint folder or file")->required();
  ask->model.add_to(*command);
  ask->run.add_to(*command);
  command->callback([ask, &action] { action = [ask] { return run_hash(*ask); }; });
}

}  // namespace cli
