// Which files hold the weights, and what their headers say. Tensor names are never used as paths.
#include "formats/safetensors/reader.h"

#include "formats/json.h"
#include "formats/safetensors/header.h"
#include "libshard/error.h"

#include <algorithm>
#include <cstdio>
#include <set>

namespace formats::safetensors {
namespace {

namespace fs = std::filesystem;
using shard::Code;

constexpr const char* kIndex = "model.safetensors.index.json";
constexpr const char* kSingle = "model.safetensors";
constexpr const char* kSharding = "DCP_SHARDING_INFO";

bool ends_with(const fs::path& path, std::string_view suffix) { return path.filename().string().ends_with(suffix); }

struct IndexFile {
  std::string name;                               ///< of the file
  std::map<std::string, std::string> weight_map;  ///< tensor → file
  std::optional<double> total_size;               ///< writers store it as a floating number, too
};

/// "./x" is x for every reader; all else is for inside() to judge.
std::string without_dots(const std::string& name) {
  fs::path out;
  for (const auto& part : fs::path(name))
    if (part != ".") out /= part;
  return out.string();
}

IndexFile read_index(const fs::path& folder, const std::string& name) {
  const auto path = inside(folder, name);
  const auto json = parse_json(read_text(path), path.string());
  shard::require(json.is_object() && json.contains("weight_map") && json["weight_map"].is_object(), Code::BadFormat,
                 [&] { return fmt::format("{}: holds no weight_map", path.string()); });
  IndexFile out;
  out.name = name;
  for (const auto& entry : json["weight_map"].items()) {
    shard::require(entry.value().is_string(), Code::BadFormat,
                   [&] { return fmt::format("{}: '{}' names no file", path.string(), entry.key()); });
    out.weight_map[entry.key()] = without_dots(entry.value().get<std::string>());
  }
  if (json.contains("metadata") && json["metadata"].is_object() && json["metadata"].contains("total_size"))
    if (const auto& total = json["metadata"]["total_size"]; total.is_number()) out.total_size = total.get<double>();
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
  Folder(const fs::path& path, const OpenOptions& options) : options_(options) {
    out_.format = "hf";
    if (fs::is_directory(path)) {
      out_.folder = path;
      if (fs::exists(path / kIndex)) index_ = read_index(path, kIndex);
      else if (fs::exists(path / kSingle)) names_ = {kSingle};
      else names_ = dcp_shards(path), dcp_shards_ = true;
    } else {
      out_.folder = path.parent_path().empty() ? fs::path(".") : path.parent_path();
      if (ends_with(path, ".index.json")) index_ = read_index(out_.folder, path.filename().string());
      else names_ = {path.filename().string()};
    }
    if (index_)
      for (const auto& [name, file] : index_->weight_map)
        if (std::find(names_.begin(), names_.end(), file) == names_.end()) names_.push_back(file);
  }

  Checkpoint open() {
    std::vector<fs::path> paths;
    for (const auto& name : names_) paths.push_back(inside(out_.folder, name));
    out_.files = std::make_shared<FilePool>(std::move(paths));
    out_.stored.files = names_;
    for (std::uint32_t i = 0; i < names_.size(); ++i) add_file(i);
    if (index_) check_index();
    if (dcp_shards_) check_shards();
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
    if (sharding.is_object()) {
      std::set<std::string_view> held;
      for (const auto& entry : header.entries) held.insert(entry.name);
      for (const auto& info : sharding.items())
        if (!held.contains(info.key()))
          out_.findings.push_back({"missing", shard::Finding::Severity::Error, info.key(), fmt::format("{} of {} names it; the file does not hold it", kSharding, names_[i])});
    }
    for (const auto& entry : header.entries) {
      if (index_ && !listed(entry, i)) continue;
      add_entry(entry, i, sharding);
    }
  }

  /// Whether the index places it in this file. Readers such as transformers load whole files, so what it does not list is no less there.
  bool listed(const Entry& entry, std::uint32_t i) {
    const auto placed = index_->weight_map.find(entry.name);
    if (placed != index_->weight_map.end() && placed->second == names_[i]) return true;
    if (std::any_of(options_.drop.begin(), options_.drop.end(), [&](const auto& pattern) { return glob(pattern, entry.name); })) {
      if (placed == index_->weight_map.end()) out_.not_carried.push_back({entry.name, "--drop"});
    } else if (placed == index_->weight_map.end()) {
      out_.findings.push_back({"unexpected", shard::Finding::Severity::Error, entry.name,
                               fmt::format("{} holds it; {} does not list it, and readers differ in what they do then (--drop leaves it out)", names_[i], index_->name)});
    } else {
      copies_.push_back({entry, i});
    }
    return false;
  }

  /// shard-00002-model-00001-of-00003.safetensors: the second rank's part of the first of three files. A rank without a
  /// tensor of a file leaves it out, but no file and no rank is left out by all. Where last ranks' are lost, nothing tells.
  void check_shards() {
    std::map<unsigned, std::set<unsigned>> models;  // ranks by file
    std::set<unsigned> ranks;
    unsigned of = 0;
    for (const auto& name : names_) {
      unsigned rank = 0, model = 0, count = 0;
      int end = 0;
      if (std::sscanf(name.c_str(), "shard-%u-model-%u-of-%u.safetensors%n", &rank, &model, &count, &end) != 3 || static_cast<std::size_t>(end) != name.size()) return;
      ranks.insert(rank);
      models[model].insert(rank);
      of = std::max(of, count);
    }
    const auto add = [&](shard::Finding::Severity severity, std::string key, std::string message) { out_.findings.push_back({"coverage", severity, std::move(key), std::move(message)}); };
    if (const auto rank = first_gap(ranks); rank < *ranks.rbegin())
      add(shard::Finding::Severity::Error, fmt::format("shard-{:05d}-*", rank), fmt::format("is not there; {} is", names_.back()));
    std::set<unsigned> files;
    for (const auto& [model, holders] : models) files.insert(model);
    if (const auto model = first_gap(files); model <= of)
      add(shard::Finding::Severity::Error, fmt::format("shard-*-model-{:05d}-of-{:05d}", model, of), fmt::format("is not there; {} is", names_.back()));
    for (const auto& [model, holders] : models)
      if (holders.size() > 1 && holders.size() < ranks.size()) {
        const auto key = fmt::format("shard-*-model-{:05d}-of-{:05d}", model, of);
        const auto why = fmt::format("is there of {} ranks, other files of {}; right only where the others held no part of it", holders.size(), ranks.size());
        add(shard::Finding::Severity::Warning, key, why);
        out_.notes.push_back(fmt::format("{}: {}", key, why));
      }
  }

  /// The least number from 1 on that is not there.
  static unsigned first_gap(const std::set<unsigned>& numbers) {
    unsigned out = 1;
    while (numbers.contains(out)) ++out;
    return out;
  }

  void check_index() {
    for (const auto& placed : index_->weight_map)
      shard::require(out_.stored.tensors.contains(placed.first), Code::Mismatch, [&] {
        return fmt::format("{}: the index places '{}' here; the file does not hold it", placed.second, placed.first);
      });
    if (!copies_.empty()) {
      const LocalReader reader(out_.stored, out_.files);
      for (const auto& [entry, i] : copies_) check_copy(reader, entry, i);
    }
    check_total_size();
  }

  /// A tensor that a file holds beside the one that the index names. Readers take the one or the other, so both should be equal.
  void check_copy(const LocalReader& reader, const Entry& entry, std::uint32_t i) {
    const auto& tensor = out_.stored.tensors.at(entry.name);
    const auto& named = index_->weight_map.at(entry.name);
    const bool same = tensor.dtype == entry.dtype && tensor.natural == entry.shape &&
                      (!options_.places || same_bytes(reader, tensor.shards.front().place, {i, entry.begin, {}}, entry.end - entry.begin));
    if (!same) {
      out_.findings.push_back({"replica", shard::Finding::Severity::Error, entry.name,
                               fmt::format("{}, which {} names, and {} hold copies of it that differ; they should be equal", named, index_->name, names_[i])});
      return;
    }
    const auto why = fmt::format("{} holds a copy of it; {} names {}", names_[i], index_->name, named);
    out_.findings.push_back({"unexpected", shard::Finding::Severity::Warning, entry.name, why});
    out_.not_carried.push_back({entry.name, why});
  }

  /// Writers count what the index lists, what lies in the files, the files themselves, or a tied head that is not stored.
  void check_total_size() {
    if (!index_->total_size) return;
    std::uint64_t listed = 0, held = 0, files = 0;
    shard::Index rows = 0;
    const auto bytes_of = [](const shard::ShardedTensor& tensor) { return static_cast<std::uint64_t>(shard::volume(tensor.natural)) * size_of(tensor.dtype); };
    for (const auto& [key, tensor] : out_.stored.tensors) {
      listed += bytes_of(tensor);
      if (tensor.natural.size() == 2) rows = std::max(rows, tensor.natural[0]);
    }
    for (const auto& stream : out_.stored.streams) {
      held += stream.size;
      files += stream.offset + stream.size;
    }
    std::set<double> right{static_cast<double>(listed), static_cast<double>(held), static_cast<double>(files)};
    for (const auto& [key, tensor] : out_.stored.tensors)
      if (tensor.natural.size() == 2 && tensor.natural[0] == rows) right.insert(static_cast<double>(listed + bytes_of(tensor)));
    if (right.contains(*index_->total_size)) return;
    out_.findings.push_back({"coverage", shard::Finding::Severity::Warning, index_->name,
                             fmt::format("metadata.total_size is {:.0f}; the tensors that it lists take {} bytes", *index_->total_size, listed)});
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

  const OpenOptions& options_;
  Checkpoint out_;
  std::vector<std::string> names_;
  std::optional<IndexFile> index_;
  std::vector<std::pair<Entry, std::uint32_t>> copies_;  ///< of tensors that the index names in another file
  bool sharded_ = false;
  bool dcp_shards_ = false;  ///< files of torch's HuggingFaceStorageWriter, without an index
};

}  // namespace

bool matches(const fs::path& path) {
  if (!fs::is_directory(path)) return ends_with(path, ".safetensors") || ends_with(path, ".safetensors.index.json");
  return fs::exists(path / kIndex) || fs::exists(path / kSingle) || !dcp_shards(path).empty();
}

Checkpoint open(const fs::path& path, const OpenOptions& options) { return Folder(path, options).open(); }

}  // namespace formats::safetensors
