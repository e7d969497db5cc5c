// torch_dist: a DCP folder whose keys are Megatron's, plus a common state in common.pt or in a DCP item.
#include "formats/json.h"
#include "formats/megatron/common_state.h"
#include "formats/megatron/model.h"
#include "formats/megatron/readers.h"
#include "formats/torch_dcp/reader.h"
#include "libshard/error.h"
#include "libshard/families/megatron.h"

#include <algorithm>

namespace formats::megatron {
namespace {

using shard::Code;
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

/// "key/shard_3.1_4.8" → {"key", {3, 1}}.
struct ObjectKey {
  std::string key;
  std::vector<Index> at;
};
std::optional<ObjectKey> object_key(const std::string& text) {
  const auto slash = text.rfind("/shard_");
  if (slash == text.npos) return std::nullopt;
  ObjectKey out{text.substr(0, slash), {}};
  Index number = -1;
  for (auto i = slash + 7; i <= text.size(); ++i) {
    const char c = i < text.size() ? text[i] : '_';
    if (c >= '0' && c <= '9' && number < (Index{1} << 40)) number = std::max<Index>(number, 0) * 10 + (c - '0');
    else if (c == '.' || c == '_') {
      if (number < 0) return std::nullopt;
      out.at.push_back(number);
      number = -1;
      if (c == '_') return out;
    } else return std::nullopt;
  }
  return std::nullopt;
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
    interpret(out_, "d", options_);
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
  return true;
}

Checkpoint open_torch_dist(const std::filesystem::path& folder, const OpenOptions& options) {
  return DistReader(folder, options).open();
}

}  // namespace formats::megatron
