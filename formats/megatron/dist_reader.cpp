// torch_dist: a DCP folder whose keys are Megatron's, plus a common state in common.pt or in a DCP item.
#include "formats/json.h"
#include "formats/megatron/common_state.h"
#include "formats/megatron/model.h"
#include "formats/megatron/readers.h"
#include "formats/torch_dcp/reader.h"
#include "libshard/error.h"
#include "libshard/families/megatron.h"

#include <algorithm>
#include <set>

#include <fmt/ranges.h>

namespace formats::megatron {
namespace {

using shard::Code;
using shard::Finding;
using shard::Index;

constexpr std::string_view kExtra = "._extra_state";

bool is_optimizer(std::string_view key) {
  while (key.starts_with("chained_")) {
    const auto dot = key.find('.');
    if (dot == key.npos) break;
    key.remove_prefix(dot + 1);
  }
  return key.starts_with("optimizer.");
}

/// "key/shard_3.1_4.8" → {"key", {3, 1}, {4, 8}}; the last is empty where the name does not say it.
struct ObjectKey {
  std::string key;
  std::vector<Index> at, of;
};
std::optional<ObjectKey> object_key(const std::string& text) {
  const auto slash = text.rfind("/shard_");
  if (slash == text.npos) return std::nullopt;
  ObjectKey out{text.substr(0, slash), {}, {}};
  auto* numbers = &out.at;
  Index number = -1;
  for (auto i = slash + 7; i <= text.size(); ++i) {
    const char c = i < text.size() ? text[i] : '_';
    if (c >= '0' && c <= '9' && number < (Index{1} << 40)) number = std::max<Index>(number, 0) * 10 + (c - '0');
    else if ((c == '.' || c == '_') && number >= 0) {
      numbers->push_back(number);
      number = -1;
      if (c == '_') numbers = &out.of;
    } else if (numbers == &out.at) return std::nullopt;
    else break;
  }
  if (out.of.size() != out.at.size()) out.of.clear();
  return out;
}

std::string dotted(const std::vector<Index>& numbers) { return fmt::format("{}", fmt::join(numbers, ".")); }

/// The first place of a grid that `held` lacks, in their order.
std::optional<std::vector<Index>> first_missing(const std::vector<Index>& of, const std::set<std::vector<Index>>& held) {
  if (std::any_of(of.begin(), of.end(), [](Index size) { return size == 0; })) return std::nullopt;
  std::vector<Index> at(of.size());
  for (const auto& place : held) {
    if (place != at) return at;
    auto d = at.size();
    while (d > 0 && ++at[d - 1] == of[d - 1]) at[--d] = 0;
    if (d == 0) return std::nullopt;
  }
  return at;
}

/// The key with its stacked indices written out: "decoder.layers.x._extra_state" at {3} → "decoder.layers.3.x._extra_state".
std::string numbered(std::string key, const std::vector<Index>& at, bool stacked) {
  std::size_t next = 0;
  if (stacked && key.starts_with("decoder.layers.") && next < at.size())
    key.insert(std::string_view("decoder.layers.").size(), std::to_string(at[next++]) + ".");
  if (const auto experts = key.find("experts.experts."); experts != key.npos && next < at.size())
    key.insert(experts + std::string_view("experts.experts.").size(), std::to_string(at[next]) + ".");
  return key;
}

bool layers_numbered(const std::string& key) {
  constexpr std::string_view prefix = "decoder.layers.";
  return !key.starts_with(prefix) || (key.size() > prefix.size() && std::isdigit(static_cast<unsigned char>(key[prefix.size()])));
}

class DistReader {
 public:
  DistReader(const std::filesystem::path& folder, const OpenOptions& options) : options_(options) {
    out_.format = "torch_dist";
    out_.folder = folder;
    out_.megatron.emplace();
  }

  Checkpoint open() {
    metadata_ = torch_dcp::read_stored(out_, options_);
    sort_keys();
    read_common();
    take_args(out_, options_);
    read_extra_states();
    check_extra_states();
    tie_head();
    try {
      interpret(out_, "d", options_);
    } catch (const shard::Error& error) {
      if (out_.megatron->args != 0) throw;
      throw error.within(out_.folder.string() + ": neither common.pt nor common_state holds args");
    }
    check_args();
    return std::move(out_);
  }

 private:
  void sort_keys() {
    for (const auto& [key, tensor] : out_.stored.tensors)
      if (is_optimizer(key)) out_.optimizer.insert(key);
    out_.needs_weights_only = !out_.optimizer.empty();
    for (auto& object : out_.stored.objects) {
      const auto parsed = object_key(object.key);
      const auto key = parsed ? parsed->key : object.key;
      if (key.ends_with("_extra_state")) object.kind = "extra_state";
      else if (key == "common_state") object.kind = "common_state";
      else if (is_optimizer(key)) {
        object.kind = "optimizer";
        out_.needs_weights_only = true;
      } else {
        object.kind = key == "rng_state" ? "rng_state" : "object";
        out_.not_carried.push_back({object.key, key == "rng_state" ? "random state belongs to the ranks that wrote it" : "has no place in another layout"});
      }
    }
  }

  void read_common() {
    auto& state = *out_.megatron;
    const auto path = inside(out_.folder, "common.pt");
    compare_commons(path);
    if (std::filesystem::exists(path)) {
      out_.stored.objects.push_back({"common.pt", "common_state", std::filesystem::file_size(path), 0, 0});
      const File file(path);
      try {
        take_common(out_, open_torch(file).graph);
      } catch (const shard::Error& error) {
        throw error.within(path.string());
      }
    } else if (const auto item = metadata_.bytes.find("common_state/shard_0_1"); item != metadata_.bytes.end()) {
      try {
        take_common(out_, torch_dcp::open_item(out_, item->second).graph);
      } catch (const shard::Error& error) {
        throw error.within("common_state");
      }
    } else {
      state.common = std::make_shared<pickle::Graph>();
    }
  }

  /// Newer cores keep the common state in an item, older ones in a file; where both are there, neither is chosen unseen.
  void compare_commons(const std::filesystem::path& path) {
    const auto item = metadata_.bytes.find("common_state/shard_0_1");
    if (item == metadata_.bytes.end() || !std::filesystem::exists(path)) return;
    const auto text = [](const pickle::Graph& graph) {
      const bool boxed = graph.kind(graph.root) == pickle::Kind::List && graph.items(graph.root).size() == 1;
      pickle::Graph copy;
      const auto root = copy.import(graph, boxed ? graph.items(graph.root)[0] : graph.root);
      return pickle::write(copy, root, 2);
    };
    if (text(open_torch(File(path)).graph) != text(torch_dcp::open_item(out_, item->second).graph))
      out_.findings.push_back({"replica", Finding::Severity::Error, "common_state", "common.pt and the item common_state/shard_0_1 differ; only one should be there"});
  }

  /// A tied model's head is the embedding: where it is stored all the same, it is a copy to be compared.
  void tie_head() {
    auto& tensors = out_.stored.tensors;
    const auto head = tensors.find("output_layer.weight"), embedding = tensors.find("embedding.word_embeddings.weight");
    if (!shard::holds("tied", out_.params) || head == tensors.end() || embedding == tensors.end()) return;
    if (std::any_of(options_.drop.begin(), options_.drop.end(), [](const auto& pattern) { return glob(pattern, "output_layer.weight"); })) return;
    if (head->second.dtype != embedding->second.dtype || head->second.global_shape != embedding->second.global_shape)
      out_.findings.push_back({"tie", Finding::Severity::Error, head->first,
                               fmt::format("is {} {}; args tie it to the embedding, which is {} {}", shard::name(head->second.dtype), shard::to_string(head->second.global_shape),
                                           shard::name(embedding->second.dtype), shard::to_string(embedding->second.global_shape))});
    else
      for (auto& shard : head->second.shards) {
        shard.replica_id[0] = 1;
        embedding->second.shards.push_back(std::move(shard));
      }
    tensors.erase(head);
  }

  /// Boxes place what is read, so args are only compared: their sizes are what a target keeps.
  void check_args() {
    if (out_.megatron->args == 0 || !out_.parallel) return;
    const auto& p = *out_.parallel;
    const auto add = [&](std::string key, std::string what) { out_.findings.push_back({"rank", Finding::Severity::Error, "args." + key, std::move(what)}); };
    const auto experts = out_.megatron->experts;
    const auto found = out_.findings.size();
    for (const auto& [name, size] : {std::pair{"tensor_model_parallel_size", p.tp}, {"pipeline_model_parallel_size", p.pp}, {"virtual_pipeline_model_parallel_size", p.vpp},
                                     {"expert_model_parallel_size", p.ep}, {"expert_tensor_parallel_size", p.etp}})
      if (size < 1) add(name, fmt::format("is {}; should be at least 1", size));
    if (found != out_.findings.size()) return;
    if (experts % p.ep != 0) add("expert_model_parallel_size", fmt::format("is {}, which does not divide the {} experts", p.ep, experts));
    const auto embedding = out_.stored.tensors.find("embedding.word_embeddings.weight");
    if (embedding != out_.stored.tensors.end() && !embedding->second.global_shape.empty()) {
      std::set<Index> cuts;
      for (const auto& shard : embedding->second.shards)
        if (!empty(shard.box)) cuts.insert(shard.box.lo[0]);
      if (static_cast<Index>(cuts.size()) % p.tp != 0)  // torch FSDP cuts each rank's part again
        add("tensor_model_parallel_size", fmt::format("is {}; the embedding is stored in {} parts", p.tp, cuts.size()));
    }
    if (!options_.drop.empty()) return;  // what is left may not fill the stages
    try {
      place_layers(p, out_.megatron->layers, out_.megatron->mtp_layers);
    } catch (const shard::Error& error) {
      add("pipeline_model_parallel_size", error.what());
    }
  }

  /// A stacked module's states are numbered within the whole: each should be there.
  void check_extra_states() {
    std::map<std::string, std::pair<std::vector<Index>, std::set<std::vector<Index>>>> grids;
    for (const auto& [text, item] : metadata_.bytes) {
      const auto parsed = object_key(text);
      if (!parsed || !parsed->key.ends_with(kExtra) || parsed->of.empty()) continue;
      auto& [of, held] = grids[parsed->key];
      if (of.empty()) of = parsed->of;
      bool inside = of == parsed->of;
      for (std::size_t d = 0; inside && d < of.size(); ++d) inside = parsed->at[d] < of[d];
      if (inside) held.insert(parsed->at);
      else out_.findings.push_back({"unexpected", Finding::Severity::Error, text, fmt::format("lies outside the {} states of its module", dotted(of))});
    }
    for (const auto& [key, grid] : grids)
      if (const auto missing = first_missing(grid.first, grid.second))
        out_.findings.push_back({"missing", Finding::Severity::Error, fmt::format("{}/shard_{}_{}", key, dotted(*missing), dotted(grid.first)),
                                 fmt::format("is not there; {} of the module's {} states are", grid.second.size(), fmt::join(grid.first, " × "))});
  }

  void read_extra_states() {
    auto& state = *out_.megatron;
    const shard::Table table(shard::megatron_rows(), "d");
    for (const auto& [text, item] : metadata_.bytes) {
      const auto parsed = object_key(text);
      if (!parsed || !parsed->key.ends_with(kExtra)) continue;
      const auto name = extra_state_name(table, out_.params, numbered(parsed->key, parsed->at, !layers_numbered(parsed->key)));
      if (name.empty()) {
        out_.not_carried.push_back({text, "extra state of a module that this family does not have"});
        continue;
      }
      if (!options_.places) continue;
      try {
        const auto archive = torch_dcp::open_item(out_, item);
        auto node = archive.graph.root;
        if (archive.graph.kind(node) == pickle::Kind::List && !archive.graph.items(node).empty()) node = archive.graph.items(node)[0];
        auto& extra = state.extra[name] = extra_state(*out_.files->get(item.file), archive, node);
        if (extra.kind != ExtraState::Kind::None) state.te = true;
      } catch (const shard::Error& error) {
        throw error.within(text);
      }
    }
  }

  const OpenOptions& options_;
  Checkpoint out_;
  torch_dcp::Metadata metadata_;
};

}  // namespace

bool is_torch_dist(const std::filesystem::path& folder) {
  const auto path = inside(folder, "metadata.json");
  if (!std::filesystem::is_regular_file(path)) return false;
  const auto json = parse_json(read_text(path, 1 << 20), path.string());
  if (!json.is_object() || !json.contains("sharded_backend")) return false;
  const auto& backend = json["sharded_backend"];
  shard::require(backend == "torch_dist", Code::BadFormat, [&] {
    return fmt::format("{}: sharded_backend is {}; only torch_dist is supported", path.string(), backend.dump());
  });
  // Megatron refuses other numbers, too: they stand for other ways to store.
  for (const char* name : {"sharded_backend_version", "common_backend_version"})
    shard::require(!json.contains(name) || json[name] == 1, Code::BadFormat,
                   [&] { return fmt::format("{}: {} is {}; only 1 is supported", path.string(), name, json[name].dump()); });
  return true;
}

Checkpoint open_torch_dist(const std::filesystem::path& folder, const OpenOptions& options) {
  return DistReader(folder, options).open();
}

}  // namespace formats::megatron
