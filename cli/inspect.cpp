// shardkit inspect: what is in a checkpoint, from metadata only.
#include "cli/commands.h"
#include "cli/options.h"
#include "cli/print.h"
#include "formats/hf/lora.h"
#include "libshard/error.h"

#include <set>

#include <algorithm>

namespace cli {
namespace {

struct InspectAsk {
  std::string path;
  std::vector<std::string> tensors;
  ModelOptions model;
  RunOptions run;
};

bool wanted(const InspectAsk& ask, const std::string& key) {
  return ask.tensors.empty() || std::any_of(ask.tensors.begin(), ask.tensors.end(), [&](const auto& pattern) { return formats::glob(pattern, key); });
}

std::uint64_t bytes_of(const shard::ShardedTensor& tensor) {
  return static_cast<std::uint64_t>(shard::volume(tensor.global_shape)) * size_of(tensor.dtype);
}

Json shards_json(const formats::Checkpoint& checkpoint, const shard::ShardedTensor& tensor) {
  auto out = Json::array();
  for (const auto& shard : tensor.shards) {
    const auto& stream = checkpoint.stored.streams[shard.place.stream];
    out.push_back({{"file", checkpoint.stored.files[stream.file]},
                   {"offset", stream.offset + shard.place.offset},
                   {"bytes", static_cast<std::uint64_t>(shard::volume(shard.box.size)) * size_of(tensor.dtype)},
                   {"box", {{"lo", shard.box.lo}, {"size", shard.box.size}}},
                   {"replica_id", shard.replica_id}});
  }
  return out;
}

struct Totals {
  std::uint64_t parameters = 0, bytes = 0;
};

Totals totals(const formats::Checkpoint& checkpoint) {
  Totals out;
  for (const auto& [key, tensor] : checkpoint.logical.tensors) out.parameters += static_cast<std::uint64_t>(shard::volume(tensor.global_shape));
  for (const auto& [key, tensor] : checkpoint.stored.tensors) out.bytes += bytes_of(tensor);
  return out;
}

Json adapter_json(const formats::hf::Adapter& adapter) {
  const auto& config = adapter.config;
  return {{"type", "lora"},
          {"r", config.rank},
          {"lora_alpha", config.alpha},
          {"use_rslora", config.root},
          {"target_modules", config.target_pattern.empty() ? Json(config.targets) : Json(config.target_pattern)},
          {"modules_to_save", config.saved},
          {"base_model", config.base.empty() ? Json(nullptr) : Json(config.base)},
          {"modules", adapter.modules.size()}};
}

std::string shown(const Json& text) { return text.dump(-1, ' ', true, Json::error_handler_t::replace); }

/// "LoRA, r 8, alpha 16 (rsLoRA)"
void add_adapter(const formats::hf::Adapter& adapter, std::vector<std::vector<std::string>>& head) {
  const auto& config = adapter.config;
  head.push_back({"adapter", fmt::format("LoRA, r {}, alpha {}{}", config.rank, config.alpha, config.root ? " (rsLoRA)" : "")});
  head.push_back({"of", config.base.empty() ? "a base that is not named" : shown(config.base)});
  std::string targets = config.target_pattern.empty() ? "" : shown(config.target_pattern);
  for (const auto& name : config.targets) targets += (targets.empty() ? "" : ", ") + name;
  head.push_back({"modules", fmt::format("{}: {}", adapter.modules.size(), targets)});
}

int print_as_json(const InspectAsk& ask, const formats::Checkpoint& checkpoint) {
  const auto sums = totals(checkpoint);
  Json out{{"format", checkpoint.format},
           {"iteration", checkpoint.iteration ? Json(*checkpoint.iteration) : Json(nullptr)},
           {"layout", layout_json(checkpoint.parallel)},
           {"family", checkpoint.family.empty() ? Json(nullptr) : Json(checkpoint.family)},
           {"tied", checkpoint.tied ? Json(*checkpoint.tied) : Json(nullptr)},
           {"parameters", sums.parameters},
           {"bytes", sums.bytes}};
  if (checkpoint.adapter) out["adapter"] = adapter_json(*checkpoint.adapter);
  if (checkpoint.vocab) out["vocab_size"] = *checkpoint.vocab;
  auto& tensors = out["tensors"] = Json::array();
  for (const auto& [key, tensor] : checkpoint.stored.tensors)
    if (wanted(ask, key))
      tensors.push_back({{"key", key}, {"dtype", shard::name(tensor.dtype)}, {"shape", tensor.global_shape}, {"shards", shards_json(checkpoint, tensor)}});
  auto& objects = out["objects"] = Json::array();
  for (const auto& object : checkpoint.stored.objects) objects.push_back({{"key", object.key}, {"kind", object.kind}, {"bytes", object.bytes}});
  if (!checkpoint.findings.empty()) out["findings"] = findings_json(checkpoint.findings);
  print_json(out);
  return 0;
}

int print_for_people(const InspectAsk& ask, const formats::Checkpoint& checkpoint) {
  const auto sums = totals(checkpoint);
  std::vector<std::vector<std::string>> head{{"format", checkpoint.format}};
  if (!checkpoint.family.empty()) head.push_back({"family", checkpoint.family});
  if (checkpoint.adapter) add_adapter(*checkpoint.adapter, head);
  if (checkpoint.iteration) head.push_back({"iteration", std::to_string(*checkpoint.iteration)});
  if (checkpoint.parallel) head.push_back({"layout", layout_line(*checkpoint.parallel)});
  if (checkpoint.tied) head.push_back({"embeddings", *checkpoint.tied ? "tied" : "untied"});
  if (checkpoint.vocab) head.push_back({"vocabulary", std::to_string(*checkpoint.vocab)});
  head.push_back({"parameters", human_count(sums.parameters)});
  const auto files = std::set<std::string>(checkpoint.stored.files.begin(), checkpoint.stored.files.end()).size();  // computed streams repeat a name
  head.push_back({"tensors", fmt::format("{} in {} file{}, {}", checkpoint.stored.tensors.size(), files, files == 1 ? "" : "s", human_bytes(sums.bytes))});
  print_table(head);
  fmt::print("\n");
  std::vector<std::vector<std::string>> rows{{"DTYPE", "SHAPE", "SHARDS", "KEY"}};
  for (const auto& [key, tensor] : checkpoint.stored.tensors)
    if (wanted(ask, key)) rows.push_back({std::string(shard::name(tensor.dtype)), shard::to_string(tensor.global_shape), std::to_string(tensor.shards.size()), key});
  print_table(rows);
  std::map<std::string, std::pair<std::size_t, std::uint64_t>> kinds;
  for (const auto& object : checkpoint.stored.objects) ++kinds[object.kind].first, kinds[object.kind].second += object.bytes;
  if (!kinds.empty()) fmt::print("\nobjects:");
  for (const auto& [kind, sum] : kinds) fmt::print(" {} × {} ({})", sum.first, kind, human_bytes(sum.second));
  if (!kinds.empty()) fmt::print("\n");
  if (!checkpoint.findings.empty()) fmt::print("\n"), print_findings(checkpoint.findings);
  return 0;
}

}  // namespace

void add_inspect(CLI::App& app, Action& action) {
  auto ask = std::make_shared<InspectAsk>();
  auto* command = app.add_subcommand("inspect", "What is in a checkpoint, from metadata only");
  command->add_option("CKPT", ask->path, "Checkpoint folder or file")->required();
  command->add_option("--tensors", ask->tensors, "Only tensors whose key fits GLOB")->type_name("GLOB");
  ask->model.add_to(*command);
  ask->run.add_to(*command);
  command->callback([ask, &action] {
    action = [ask] {
      auto options = ask->model.open;
      options.places = false;
      options.threads = ask->run.budget().threads;
      const auto checkpoint = formats::open(ask->path, options);
      check_dropped(options, {&checkpoint});
      return ask->run.json ? print_as_json(*ask, checkpoint) : print_for_people(*ask, checkpoint);
    };
  });
}

}  // namespace cli
