// Which files hold the weights, and what their headers say. Tensor names are never used as paths.
#include "formats/safetensors/reader.h"

#include "formats/json.h"
#include "formats/safetensors/header.h"
#include "libshard/error.h"

#include <algorithm>

namespace formats::safetensors {
namespace {

namespace fs = std::filesystem;
using shard::Code;

constexpr const char* kIndex = "model.safetensors.index.json";
constexpr const char* kSingle = "model.safetensors";
constexpr const char* kSharding = "DCP_SHARDING_INFO";

bool ends_with(const fs::path& path, std::string_view suffix) { return path.filename().string().ends_with(suffix); }

/// weight_map of an index: tensor → file.
std::map<std::string, std::string> read_index(const fs::path& path) {
  const auto json = parse_json(read_text(path), path.string());
  shard::require(json.is_object() && json.contains("weight_map") && json["weight_map"].is_object(), Code::BadFormat,
                 [&] { return fmt::format("{}: holds no weight_map", path.string()); });
  std::map<std::string, std::string> out;
  for (const auto& entry : json["weight_map"].items()) {
    shard::require(entry.value().is_string(), Code::BadFormat,
                   [&] { return fmt::format("{}: '{}' names no file", path.string(), entry.key()); });
    out[entry.key()] = entry.value().get<std::string>();
  }
  return out;
}

/// The shards that torch's HuggingFaceStorageWriter leaves without an index.
std::vector<std::string> dcp_shards(const fs::path& folder) {
  std::vector<std::string> out;
  for (const auto& entry : fs::directory_iterator(folder)) {
    const auto name = entry.path().filename().string();
    if (name.starts_with("shard-") && name.ends_with(".safetensors")) out.push_back(name);
  }
  std::sort(out.begin(), out.end());
  return out;
}

class Folder {
 public:
  Folder(const fs::path& path) {
    out_.format = "hf";
    if (fs::is_directory(path)) {
      out_.folder = path;
      if (fs::exists(path / kIndex)) index_ = read_index(inside(path, kIndex));
      else if (fs::exists(path / kSingle)) names_ = {kSingle};
      else names_ = dcp_shards(path);
    } else {
      out_.folder = path.parent_path().empty() ? fs::path(".") : path.parent_path();
      if (ends_with(path, ".index.json")) index_ = read_index(inside(out_.folder, path.filename().string()));
      else names_ = {path.filename().string()};
    }
    if (index_)
      for (const auto& [name, file] : *index_)
        if (std::find(names_.begin(), names_.end(), file) == names_.end()) names_.push_back(file);
  }

  Checkpoint open() {
    std::vector<fs::path> paths;
    for (const auto& name : names_) paths.push_back(inside(out_.folder, name));
    out_.files = std::make_shared<FilePool>(std::move(paths));
    out_.stored.files = names_;
    for (std::uint32_t i = 0; i < names_.size(); ++i) add_file(i);
    if (index_)
      for (const auto& placed : *index_)
        shard::require(out_.stored.tensors.contains(placed.first), Code::Mismatch, [&] {
          return fmt::format("{}: the index places '{}' here; the file does not hold it", placed.second, placed.first);
        });
    for (auto& [key, tensor] : out_.stored.tensors) {
      if (sharded_) settle(tensor);
      check_cover(tensor, out_.findings);
    }
    out_.logical = out_.stored;
    return std::move(out_);
  }

 private:
  void add_file(std::uint32_t i) {
    const auto file = out_.files->get(i);
    const auto header = read_header(*file);
    out_.metadata.insert(header.metadata.begin(), header.metadata.end());
    nlohmann::json sharding;
    if (const auto info = header.metadata.find(kSharding); info != header.metadata.end()) {
      sharding = parse_json(info->second, file->name());
      sharded_ = true;
    }
    out_.stored.streams.push_back({i, header.data_offset, file->size() - header.data_offset, std::nullopt, false});
    for (const auto& entry : header.entries) {
      if (index_) {
        const auto placed = index_->find(entry.name);
        if (placed == index_->end() || placed->second != names_[i]) {
          const auto why = fmt::format("{} holds it; the index does not say so", names_[i]);
          out_.findings.push_back({"unexpected", shard::Finding::Severity::Warning, entry.name, why});
          out_.not_carried.push_back({entry.name, why});
          continue;
        }
      }
      add_entry(entry, i, sharding);
    }
  }

  void add_entry(const Entry& entry, std::uint32_t stream, const nlohmann::json& sharding) {
    auto& tensor = out_.stored.tensors[entry.name];
    shard::require(tensor.key.empty() || sharded_, Code::Mismatch, [&] { return fmt::format("{}: in two files", entry.name); });
    if (tensor.key.empty()) tensor = {entry.name, entry.dtype, entry.shape, entry.shape, {}, false};
    auto stride = shard::row_major(entry.shape);
    for (auto& step : stride) step *= static_cast<shard::Index>(size_of(entry.dtype));
    auto box = shard::whole(entry.shape);
    if (sharding.is_object() && sharding.contains(entry.name)) box.lo = offsets(sharding[entry.name], entry);
    tensor.shards.push_back({std::move(box), {stream, entry.begin, std::move(stride)}, {}});
  }

  static shard::Shape offsets(const nlohmann::json& info, const Entry& entry) {
    shard::Shape out;
    if (info.is_object() && info.contains("saved_offsets") && info["saved_offsets"].is_array())
      for (const auto& value : info["saved_offsets"])
        if (value.is_number_unsigned() && value.get<std::uint64_t>() < (1ull << 62)) out.push_back(value.get<shard::Index>());
    shard::require(out.size() == entry.shape.size(), Code::BadFormat, [&] { return fmt::format("{}: saved_offsets do not fit its shape", entry.name); });
    return out;
  }

  /// The global shape of a sharded tensor: nothing else in the files says it.
  static void settle(shard::ShardedTensor& tensor) {
    for (const auto& shard : tensor.shards)
      for (std::size_t d = 0; d < shard.box.lo.size(); ++d)
        tensor.global_shape[d] = std::max(tensor.global_shape[d], shard.box.lo[d] + shard.box.size[d]);
    tensor.natural = tensor.global_shape;
  }

  Checkpoint out_;
  std::vector<std::string> names_;
  std::optional<std::map<std::string, std::string>> index_;
  bool sharded_ = false;
};

}  // namespace

bool matches(const fs::path& path) {
  if (!fs::is_directory(path)) return ends_with(path, ".safetensors") || ends_with(path, ".safetensors.index.json");
  return fs::exists(path / kIndex) || fs::exists(path / kSingle) || !dcp_shards(path).empty();
}

Checkpoint open(const fs::path& path, const OpenOptions&) { return Folder(path).open(); }

}  // namespace formats::safetensors
