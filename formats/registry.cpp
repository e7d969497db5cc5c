// What exists is one visible table: every format that can be opened, in the order in which content is tried.
#include "formats/checkpoint.h"
#include "formats/hdf5/hdf5.h"
#include "formats/hf/hf.h"
#include "formats/hf/lora.h"
#include "formats/megatron/readers.h"
#include "formats/megatron/writers.h"
#include "formats/plain.h"
#include "formats/safetensors/reader.h"
#include "formats/target.h"
#include "formats/torch_dcp/reader.h"
#include "libshard/error.h"

#include <algorithm>
#include <charconv>
#include <iterator>

namespace formats {
namespace {

namespace fs = std::filesystem;
using shard::Code;

struct FolderFormat {
  const char* name;
  bool (*matches)(const fs::path&);
  Checkpoint (*open)(const fs::path&, const OpenOptions&);
};
constexpr FolderFormat kFolders[] = {
    {"torch_dist", megatron::is_torch_dist, megatron::open_torch_dist},
    {"mp_rank", megatron::is_mp_rank, megatron::open_mp_rank},
    {"dcp", torch_dcp::has_metadata, torch_dcp::open_plain},
    {"hf", safetensors::matches, safetensors::open},
    {"hdf5", hdf5::matches, hdf5::open},
    {"hf", hf::is_adapter, hf::open_adapter},
};

/// Where no family is known, or weights stay quantised, keys stay as they are.
void create_hf(const fs::path& path, const Checkpoint& source, const TargetOptions& options, Target& target) {
  if (source.adapter) return hf::create_adapter(path, source, options, target);
  const bool spelled = (source.hf && source.quantised.empty()) || source.megatron;
  (spelled ? hf::create : create_safetensors)(path, source, options, target);
}

struct TargetFormat {
  const char* name;
  void (*create)(const fs::path&, const Checkpoint&, const TargetOptions&, Target&);
};
constexpr TargetFormat kTargets[] = {
    {"torch_dist", megatron::create_torch_dist},
    {"mp_rank", megatron::create_mp_rank},
    {"dcp", create_dcp},
    {"hf", create_hf},
    {"hdf5", hdf5::create},
};

constexpr const char* kTracker = "latest_checkpointed_iteration.txt";

/// An iteration's folder: "iter_0000010".
std::optional<std::int64_t> iteration_named(std::string_view name) {
  constexpr std::string_view head = "iter_";
  std::int64_t value = 0;
  if (!name.starts_with(head)) return std::nullopt;
  const auto [end, error] = std::from_chars(name.data() + head.size(), name.data() + name.size(), value);
  return error == std::errc() && end == name.data() + name.size() && value >= 0 ? std::optional(value) : std::nullopt;
}

/// What the tracker says, as Megatron reads it.
std::string tracked(const fs::path& path) {
  const auto text = read_text(inside(path, kTracker), 4096);
  const auto space = [](unsigned char c) { return std::isspace(c); };
  const auto first = std::find_if_not(text.begin(), text.end(), space);
  return {first, std::find_if_not(text.rbegin(), std::make_reverse_iterator(first), space).base()};
}

/// The highest iteration below a folder; empty where there is none.
std::string some_iteration(const fs::path& path) {
  std::pair<std::int64_t, std::string> out{-1, ""};
  for (const auto& entry : fs::directory_iterator(path)) {
    auto name = entry.path().filename().string();
    if (const auto number = iteration_named(name); number && entry.is_directory()) out = std::max(out, {*number, std::move(name)});
  }
  return out.second;
}

/// A run folder stands for its latest (or asked for) iteration.
fs::path iteration_of(const fs::path& path, const OpenOptions& options) {
  if (!fs::exists(path / kTracker) && (!options.iteration || some_iteration(path).empty())) {
    shard::require(!options.iteration, Code::Usage, [&] { return fmt::format("{}: is no Megatron run folder; --iteration has no meaning", path.string()); });
    return path;
  }
  const auto text = options.iteration ? std::to_string(*options.iteration) : tracked(path);
  const bool number = !text.empty() && text.size() < 16 && std::all_of(text.begin(), text.end(), [](unsigned char c) { return std::isdigit(c); });
  shard::require(number || text == "release", Code::BadFormat,
                 [&] { return fmt::format("{}: says '{}'; should be an iteration or 'release'", (path / kTracker).string(), text.substr(0, 40)); });
  const auto folder = inside(path, text == "release" ? text : fmt::format("iter_{:07d}", std::stoll(text)));
  shard::require(fs::is_directory(folder), Code::NotFound, [&] { return fmt::format("{}: not found", folder.string()); });
  return folder;
}

/// Which of two checkpoints in one folder is meant, nobody can tell.
void refuse_two(const fs::path& folder) {
  const bool dist = megatron::is_torch_dist(folder);
  shard::require(!megatron::is_mp_rank(folder) || (!dist && !torch_dcp::has_metadata(folder)), Code::Mismatch,
                 [&] { return fmt::format("{}: holds mp_rank_* folders beside {}; should hold one checkpoint", folder.string(), dist ? "a torch_dist checkpoint" : ".metadata"); });
}

/// Megatron goes by the state, whatever somebody called the folder; so do we, and say so.
void check_iteration(Checkpoint& checkpoint, const fs::path& folder) {
  const auto name = as_written(folder).filename().string();
  const auto named = iteration_named(name);
  if (!checkpoint.megatron || !named || !checkpoint.iteration || *named == *checkpoint.iteration) return;
  const auto why = fmt::format("holds iteration {} by its own state, which is followed", *checkpoint.iteration);
  checkpoint.findings.push_back({"rank", shard::Finding::Severity::Warning, name, why});
  checkpoint.notes.push_back(fmt::format("{} {}", name, why));
}

Checkpoint open_folder(const fs::path& path, const OpenOptions& options) {
  const auto folder = iteration_of(path, options);
  refuse_two(folder);
  for (const auto& format : kFolders) {
    if (!format.matches(folder)) continue;
    try {
      auto out = format.open(folder, options);
      check_iteration(out, folder);
      return out;
    } catch (const shard::Error& error) {  // the layout is what args say, not what somebody wants
      if (error.code != Code::BadLayout) throw;
      throw shard::Error(Code::Mismatch, fmt::format("{}: args: {}", folder.string(), error.what()));
    }
  }
  for (const auto& entry : fs::directory_iterator(folder)) {
    const auto name = entry.path().filename().string();
    shard::require(!name.ends_with(".distcp"), Code::BadFormat, [&] { return fmt::format("{}: holds .distcp files but no .metadata: an unfinished save", folder.string()); });
  }
  const auto some = some_iteration(folder);
  shard::require(some.empty(), Code::BadFormat, [&] { return fmt::format("{}: holds {} but no {}, so that none is the latest; --iteration picks one", path.string(), some, kTracker); });
  shard::fail(Code::BadFormat, "{}: holds no checkpoint of a known format (torch_dist, mp_rank, dcp, safetensors, hdf5)", path.string());
}

}  // namespace

Checkpoint open(const fs::path& path, const OpenOptions& options) try {
  std::error_code error;
  const auto status = fs::status(path, error);
  shard::require(fs::exists(status), Code::NotFound, [&] { return fmt::format("{}: not found", path.string()); });
  auto out = fs::is_directory(status) ? open_folder(path, options)
             : safetensors::matches(path) ? safetensors::open(path, options)
             : hdf5::matches(path)        ? hdf5::open(path, options)
                                          : open_torch_file(path, options);
  out.path = path;
  const bool by_keys = out.format == "hf" || out.format == "dcp" || (out.format == "hdf5" && !out.megatron);
  shard::require(options.adapter.empty() || (by_keys && !out.adapter), Code::BadFormat,
                 [&] { return fmt::format("{}: an adapter merges into a model with Hugging Face keys; convert this to hf first", path.string()); });
  if (out.adapter) {
    if (!options.drop.empty()) drop_tensors(out, options);
  } else {
    if (by_keys) hf::interpret(out, options);
    hf::take_up_carried(out, options);
    if (!options.drop.empty() && !out.megatron && !out.hf) drop_tensors(out, options);
  }
  for (const auto& pattern : options.drop)
    if (std::none_of(out.not_carried.begin(), out.not_carried.end(), [&](const Dropped& one) { return glob(pattern, one.key); })) out.unmatched.push_back(pattern);
  if (by_keys && fs::is_directory(status)) hf::name_others(out, options);
  return out;
} catch (const fs::filesystem_error& error) {
  const bool circle = error.code() == std::errc::too_many_symbolic_link_levels;
  const auto where = error.path1().empty() ? path : error.path1();
  shard::fail(circle ? Code::BadFormat : Code::Io, "{}: {}", where.string(), circle ? "links go in a circle" : error.code().message());
}

std::unique_ptr<LocalWriter> make_writer(const fs::path& path, const TargetOptions& options) {
  return options.joint ? std::make_unique<LocalWriter>(path) : std::make_unique<LocalWriter>(path, options.force);
}

Target create(const fs::path& path, const Checkpoint& source, const TargetOptions& options) {
  for (const auto& format : kTargets) {
    if (options.format != format.name) continue;
    Target out;
    const bool to_megatron = options.format == "torch_dist" || options.format == "mp_rank";
    shard::require(!source.adapter || options.format == std::string_view("hf"), Code::BadFormat,
                   [&] { return fmt::format("{}: is a LoRA adapter, which has no place in {}; --merge-lora merges it into its base", source.path.string(), options.format); });
    shard::require(source.quantised.empty() || (!to_megatron && !options.dtype), Code::BadFormat, [&] {
      return fmt::format("{}: {} is quantised, and its scale has no place in {}; --dtype bf16, f16 or f32 dequantises", source.path.string(), *source.quantised.begin(), options.format);
    });
    shard::require(!to_megatron || source.hf || source.megatron, Code::Mismatch, [&] {
      return fmt::format("{}: is no Megatron checkpoint, and {}", source.path.string(), source.notes.empty() ? "its model family is not known" : source.notes.front());
    });
    if (to_megatron && source.hf && !source.megatron) {
      out.source = std::make_shared<Checkpoint>(hf::as_megatron(source, out.notes));
      format.create(path, *out.source, options, out);
    } else {
      format.create(path, source, options, out);
    }
    if (to_megatron) hf::carry_files(source, out, "hf/", options.dtype);
    return out;
  }
  shard::fail(Code::Usage, "--to {}: is no format that can be written; torch_dist, mp_rank, dcp, hf and hdf5 are", options.format);
}

void take_vocabulary(Checkpoint& checkpoint, const OpenOptions& options) {
  if (!options.vocab) return;
  if (checkpoint.vocab) checkpoint.recorded_vocab = checkpoint.vocab;
  checkpoint.vocab = options.vocab;
}

bool names_iteration(std::string_view name) { return iteration_named(name) || name == "release"; }

bool glob(std::string_view pattern, std::string_view text) {
  std::size_t p = 0, t = 0, star = pattern.npos, mark = 0;
  while (t < text.size()) {
    if (p < pattern.size() && (pattern[p] == '?' || pattern[p] == text[t])) ++p, ++t;
    else if (p < pattern.size() && pattern[p] == '*') star = p++, mark = t;
    else if (star != pattern.npos) p = star + 1, t = ++mark;
    else return false;
  }
  while (p < pattern.size() && pattern[p] == '*') ++p;
  return p == pattern.size();
}

}  // namespace formats
