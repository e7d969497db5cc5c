// mp_rank: one torch.save file per (tensor, pipeline, expert) rank; layers are numbered within each stage and chunk.
#include "formats/megatron/args.h"
#include "formats/megatron/model.h"
#include "formats/megatron/old_names.h"
#include "formats/megatron/readers.h"
#include "libshard/error.h"
#include "libshard/families/megatron.h"
#include "libshard/parallel.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <set>
#include <utility>

namespace formats::megatron {
namespace {

namespace fs = std::filesystem;
using shard::Box;
using shard::Code;
using shard::Finding;
using shard::Index;

constexpr std::string_view kExtraState = "_extra_state";
constexpr std::string_view kLayers = "decoder.layers.";

/// The numbers of "mp_rank_00_001"; empty where the name is of another kind.
std::vector<Index> numbers_of(const std::string& name) {
  constexpr std::string_view prefix = "mp_rank_";
  std::vector<Index> out;
  if (!name.starts_with(prefix)) return out;
  for (std::size_t at = prefix.size(); at <= name.size();) {
    const auto end = std::min(name.find('_', at), name.size());
    Index value = 0;
    const auto [stop, error] = std::from_chars(name.data() + at, name.data() + end, value);
    if (error != std::errc() || stop != name.data() + end || value < 0 || value > 1'000'000) return {};
    out.push_back(value);
    at = end + 1;
  }
  return out.size() <= 3 ? out : std::vector<Index>{};
}

struct RankFile {
  std::string name;  ///< below the folder
  std::vector<Index> numbers;
};

std::vector<RankFile> rank_files(const fs::path& folder) {
  std::vector<RankFile> out;
  for (const auto& entry : fs::directory_iterator(folder)) {
    const auto name = entry.path().filename().string();
    if (!name.starts_with("mp_rank_")) continue;
    auto numbers = numbers_of(name);
    shard::require(!numbers.empty() && entry.is_directory(), Code::Mismatch,
                   [&] { return fmt::format("{}: lies beside the ranks' folders and is none; should be mp_rank_TT[_PPP][_EEE], or elsewhere", entry.path().string()); });
    const bool whole = fs::exists(entry.path() / "model_optim_rng.pt"), bare = fs::exists(entry.path() / "model_rng.pt");
    shard::require(whole || bare, Code::NotFound, [&] { return fmt::format("{}: holds no model_optim_rng.pt", entry.path().string()); });
    shard::require(!whole || !bare, Code::Mismatch,
                   [&] { return fmt::format("{}: holds model_optim_rng.pt and model_rng.pt; should hold one of them", entry.path().string()); });
    out.push_back({name + (whole ? "/model_optim_rng.pt" : "/model_rng.pt"), std::move(numbers)});
  }
  std::sort(out.begin(), out.end(), [](const RankFile& a, const RankFile& b) { return a.numbers < b.numbers; });
  shard::require(!out.empty(), Code::NotFound, [&] { return fmt::format("{}: holds no rank folder", folder.string()); });
  return out;
}

/// Where a rank stands.
struct Place {
  shard::Cell cell;
  Index stage;
  Index global_rank;
  std::string folder;
};

std::string folder_name(const shard::Parallel& p, const shard::Cell& cell, Index stage) {
  auto out = fmt::format("mp_rank_{:02d}", cell.tensor);
  if (p.pp > 1) out += fmt::format("_{:03d}", stage);
  if (p.ep > 1) out += fmt::format("_{:03d}", cell.expert);
  return out;
}

/// One tensor or extra state of one rank file, before it is known where it belongs.
struct Entry {
  std::string key;
  Index chunk;
  std::optional<StoredTensor> tensor;
  ZipRecord record;
  ExtraState extra;
};

/// What Megatron keeps at the top of a rank file beside the models: the run's, whatever tensors are in it.
bool belongs_to_run(std::string_view key) {
  static constexpr std::string_view kKnown[] = {"args", "checkpoint_version", "content_metadata", "iteration", "lr_scheduler", "num_floating_point_operations_so_far",
                                                "opt_param_scheduler", "optimizer", "rerun_state_machine", "rng_tracker_states", "tokens"};
  return std::find(std::begin(kKnown), std::end(kKnown), key) != std::end(kKnown) || key.ends_with("rng_state") || key.starts_with("model");
}

bool same(const ExtraState& a, const ExtraState& b) {
  if (a.kind != b.kind || a.bytes != b.bytes) return false;
  return a.kind != ExtraState::Kind::Object || pickle::write(*a.graph, a.ref, 2) == pickle::write(*b.graph, b.ref, 2);
}

struct RankContent {
  std::vector<Entry> entries;
  std::vector<ZipRecord> others;             ///< records that no weight lies in
  std::vector<std::string> foreign;          ///< top-level keys with tensors that are none of Megatron's
  std::vector<std::string> contradictions;   ///< to the first file's args
  std::optional<Index> rank, world_size, iteration;
  std::optional<double> version;
  std::array<Index, 4> sizes{};  ///< tp, pp, ep, vpp as its args say
  bool crcs_recorded = false;
};

class LegacyReader {
 public:
  LegacyReader(const fs::path& folder, const OpenOptions& options) : options_(options), table_(shard::megatron_rows(), "lt") {
    out_.format = "mp_rank";
    out_.folder = folder;
    out_.megatron.emplace();
    found_ = rank_files(folder);
  }

  Checkpoint open() {
    read_first();
    enumerate();
    std::vector<fs::path> paths;
    for (const auto& name : out_.stored.files) paths.push_back(inside(out_.folder, name));
    out_.files = std::make_shared<FilePool>(std::move(paths));
    std::vector<RankContent> contents(places_.size());
    shard::run_tasks(places_.size(), options_.threads, [&](std::size_t i, unsigned) { contents[i] = read_rank(i); });
    check_agreement(contents);
    pipeline_ = place_layers(*out_.parallel, need_layers(), mtp_layers());
    find_padded_vocabulary(contents);
    for (std::size_t i = 0; i < places_.size(); ++i) {
      add_rank(i, contents[i]);
      contents[i] = {};
    }
    check_layers();
    check_company();
    if (out_.params.contains("padded_vocab") && padded_rows_) out_.params["vocab"] = *padded_rows_;
    interpret(out_, "lt", options_);
    return std::move(out_);
  }

 private:
  // --- what the first file says -------------------------------------------------------------------------------------

  void read_first() {
    const auto path = inside(out_.folder, found_.front().name);
    const File file(path);
    try {
      auto archive = open_torch(file);
      const auto& g = archive.graph;
      shard::require(g.kind(g.root) == pickle::Kind::Dict, Code::BadFormat, [] { return "holds no dict"; });
      auto& state = *out_.megatron;
      if (const auto args = g.find(g.root, "args")) state.args = *args;
      shard::require(state.args != 0 && g.kind(state.args) == pickle::Kind::Object, Code::BadFormat,
                     [] { return "holds no args; a Megatron rank file does"; });
      if (const auto version = g.find(g.root, "checkpoint_version")) version_ = g.real(*version);
      shard::require(version_ == 0 || version_ == 1 || version_ == 2 || version_ == 3, Code::BadFormat,
                     [&] { return fmt::format("checkpoint_version is {}; 0, 1, 2 and 3 are known", version_); });
      shaping_ = shaping_args(g, state.args);
      const auto entries = g.items(g.root);
      for (std::size_t i = 0; i + 1 < entries.size(); i += 2) {
        if (g.kind(entries[i]) != pickle::Kind::Text) continue;
        top_level(std::string(g.text(entries[i])), entries[i + 1]);
      }
      state.common = std::make_shared<pickle::Graph>(std::move(archive.graph));
    } catch (const shard::Error& error) {
      throw error.within(path.string());
    }
    const Args args(*out_.megatron->common, out_.megatron->args);
    out_.params = params_of(args, options_.parameters);
    out_.parallel = parallel_of(args);
    if (const auto layout = args.value("pipeline_model_parallel_layout"))
      out_.parallel->pp_layout = layout_text(*out_.megatron->common, *layout);
    if (!out_.parallel->pp_layout.empty() && out_.parallel->vpp == 1) {
      const auto whole = place_layers(*out_.parallel, need_layers(), mtp_layers());
      out_.parallel->vpp = whole.chunks;
    }
    out_.vocab = args.integer("vocab_size");
    if (const auto padded = args.integer("padded_vocab_size")) out_.params["padded_vocab"] = *padded;
    if (args.text("transformer_impl").value_or("") != "local") out_.megatron->te = false;  // only keys speak for TE here
  }

  void top_level(const std::string& key, pickle::Ref value) {
    auto& state = *out_.megatron;
    if (key == "args" || key == "checkpoint_version" || key == "iteration" || key.starts_with("model")) return;
    if (key == "optimizer") {
      out_.stored.objects.push_back({key, "optimizer", 0, 0, 0});
      out_.needs_weights_only = true;
    } else if (key == "num_floating_point_operations_so_far" || key == "tokens") {
      state.items[key] = value;
    } else {
      out_.stored.objects.push_back({key, key == "rng_state" ? "rng_state" : "object", 0, 0, 0});
      out_.not_carried.push_back({key, key == "rng_state" || key.ends_with("rng_states") ? "random state belongs to the ranks that wrote it"
                                                                                          : "belongs to the run, not to the weights"});
    }
  }

  Index need_layers() const {
    const auto found = out_.params.find("layers");
    shard::require(found != out_.params.end(), Code::Mismatch, [] { return "args: num_layers is missing; give --num-layers"; });
    shard::require(found->second >= 1 && found->second <= 100'000, Code::Mismatch,
                   [&] { return fmt::format("args: num_layers is {}", found->second); });
    return found->second;
  }
  Index mtp_layers() const {
    const auto found = out_.params.find("mtp");
    return found == out_.params.end() ? 0 : found->second;
  }

  // --- which files there should be ------------------------------------------------------------------------------------

  void enumerate() {
    const auto& p = *out_.parallel;
    shard::require(p.tp >= 1 && p.pp >= 1 && p.ep >= 1 && p.etp >= 1 && p.tp <= 100'000 && p.pp <= 100'000 && p.ep <= 100'000 && p.etp <= 100'000,
                   Code::Mismatch, [&] { return fmt::format("args: parallel sizes TP {} PP {} EP {} are no layout", p.tp, p.pp, p.ep); });
    std::set<std::string> expected, present;
    for (const auto& file : found_) present.insert(file.name.substr(0, file.name.find('/')));
    const Index per_stage = ranks_per_stage(p);
    for (Index stage = 0; stage < p.pp; ++stage)
      for (const auto& cell : cells(p)) {
        places_.push_back({cell, stage, stage * per_stage + cell.rank_in_stage, folder_name(p, cell, stage)});
        expected.insert(places_.back().folder);
        if (expected.size() > present.size() + 64) break;
      }
    const auto said = fmt::format("args say TP {} PP {} EP {}", p.tp, p.pp, p.ep);
    for (const auto& name : expected)
      shard::require(present.contains(name), Code::Mismatch, [&] { return fmt::format("{}: missing; {}, {} rank folders are there", (out_.folder / name).string(), said, present.size()); });
    for (const auto& name : present)
      shard::require(expected.contains(name), Code::Mismatch, [&] { return fmt::format("{}: unexpected; {}", (out_.folder / name).string(), said); });
    std::map<std::string, std::string> file_of;
    for (const auto& file : found_) file_of[file.name.substr(0, file.name.find('/'))] = file.name;
    for (const auto& place : places_) {
      out_.stored.files.push_back(file_of[place.folder]);
      find_optimizers(place.folder);
    }
  }

  void find_optimizers(const std::string& folder) {
    std::vector<std::string> found;
    for (const auto& entry : fs::directory_iterator(out_.folder / folder)) {
      const auto name = entry.path().filename().string();
      if (name == "distrib_optim.pt" || name == "optim.pt" || (name.starts_with("layer_wise_optimizer_") && name.ends_with(".pt"))) found.push_back(folder + "/" + name);
    }
    std::sort(found.begin(), found.end());
    for (auto& name : found) {
      out_.needs_weights_only = true;
      out_.stored.objects.push_back({name, "optimizer", fs::file_size(inside(out_.folder, name)), 0, 0});
      out_.optimizer_files.push_back(std::move(name));
    }
  }

  // --- one rank file --------------------------------------------------------------------------------------------------

  RankContent read_rank(std::size_t index) const {
    const auto file = out_.files->get(static_cast<std::uint32_t>(index));
    try {
      const auto archive = open_torch(*file);
      const auto& g = archive.graph;
      shard::require(g.kind(g.root) == pickle::Kind::Dict, Code::BadFormat, [] { return "holds no dict"; });
      RankContent out;
      out.crcs_recorded = archive.zip.crcs_recorded;
      if (const auto node = g.find(g.root, "args")) {
        const Args args(g, *node);
        out.rank = args.integer("rank");
        out.world_size = args.integer("world_size");
        const auto p = parallel_of(args);
        out.sizes = {p.tp, p.pp, p.ep, p.vpp};
        out.contradictions = contradictions(shaping_args(g, *node));
      }
      if (const auto node = g.find(g.root, "iteration"); node && g.kind(*node) == pickle::Kind::Int) out.iteration = g.integer(*node);
      if (const auto node = g.find(g.root, "checkpoint_version")) out.version = g.real(*node);
      const auto entries = g.items(g.root);
      std::vector<bool> holds_storage;  // by node
      for (std::size_t i = 0; i + 1 < entries.size(); i += 2) {
        if (g.kind(entries[i]) != pickle::Kind::Text) continue;
        const auto key = g.text(entries[i]);
        if (!belongs_to_run(key)) {
          if (holds_storage.empty()) holds_storage = g.leading_to([&](pickle::Ref at) { return g.kind(at) == pickle::Kind::Persistent; });
          if (holds_storage[entries[i + 1]]) out.foreign.emplace_back(key);
        }
        if (!key.starts_with("model") || key == "model_config" || key.starts_with("modelopt")) continue;
        Index chunk = 0;
        if (key.size() > 5) {
          const auto [stop, error] = std::from_chars(key.data() + 5, key.data() + key.size(), chunk);
          shard::require(error == std::errc() && stop == key.data() + key.size() && chunk >= 0 && chunk < out_.parallel->vpp, Code::Mismatch,
                         [&] { return fmt::format("holds '{}'; args say {} chunks", key, out_.parallel->vpp); });
        }
        flatten(*file, archive, entries[i + 1], "", chunk, out.entries);
      }
      std::set<std::string_view> named;
      for (const auto& entry : out.entries)
        if (entry.tensor) named.insert(entry.record.name);
      for (const auto& record : archive.zip.records)
        if (record.name.starts_with("data/") && !named.contains(record.name)) out.others.push_back(record);
      return out;
    } catch (const shard::Error& error) {
      throw error.within(file->name());
    }
  }

  std::vector<std::string> contradictions(const std::map<std::string_view, std::string>& args) const {
    std::vector<std::string> out;
    const auto compare = [&](std::string_view name, const std::string* here, const std::string* first) {
      const auto said = [](const std::string* text) { return text ? text->substr(0, 100) : std::string("not there"); };
      if (!here || !first || *here != *first) out.push_back(fmt::format("args.{} is {}; in the first file it is {}", name, said(here), said(first)));
    };
    for (const auto& [name, text] : args) {
      const auto first = shaping_.find(name);
      compare(name, &text, first == shaping_.end() ? nullptr : &first->second);
    }
    for (const auto& [name, text] : shaping_)
      if (!args.contains(name)) compare(name, nullptr, &text);
    return out;
  }

  static std::optional<StoredTensor> tensor_at(const pickle::Graph& g, pickle::Ref ref, const std::string& key) try {
    return tensor_of(g, ref);
  } catch (const shard::Error& error) {
    throw error.within(fmt::format("'{}'", key));
  }

  static bool is_dict(const pickle::Graph& g, pickle::Ref ref) {
    return g.kind(ref) == pickle::Kind::Dict || (g.kind(ref) == pickle::Kind::Object && g.dict_items(ref));
  }

  void flatten(const File& file, const TorchFile& archive, pickle::Ref dict, const std::string& prefix, Index chunk,
               std::vector<Entry>& out, int depth = 0) const {
    const auto& g = archive.graph;
    shard::require(depth < 16, Code::BadFormat, [] { return "model: dicts are nested too deep"; });
    const auto entries = g.items(dict);
    for (std::size_t i = 0; i + 1 < entries.size(); i += 2) {
      if (g.kind(entries[i]) != pickle::Kind::Text) continue;
      auto key = prefix + std::string(g.text(entries[i]));
      const auto value = entries[i + 1];
      if (is_dict(g, value)) {
        flatten(file, archive, value, key + ".", chunk, out, depth + 1);
        continue;
      }
      key = modern_name(key);
      if (key.ends_with(kExtraState)) {
        try {
          out.push_back({key, chunk, std::nullopt, {}, extra_state(file, archive, value)});
        } catch (const shard::Error& error) {
          throw error.within(key);
        }
        continue;
      }
      auto tensor = tensor_at(g, value, key);
      shard::require(tensor.has_value(), Code::BadFormat, [&] { return fmt::format("'{}' is no tensor", key); });
      const auto* record = archive.zip.find("data/" + tensor->storage);
      shard::require(record != nullptr, Code::BadFormat, [&] { return fmt::format("'{}': storage {} is missing", key, tensor->storage); });
      out.push_back({std::move(key), chunk, std::move(tensor), *record, {}});
    }
  }

  // --- do the files agree? --------------------------------------------------------------------------------------------

  void check_agreement(const std::vector<RankContent>& contents) {
    const auto& p = *out_.parallel;
    const std::array<Index, 4> sizes{p.tp, p.pp, p.ep, p.pp_layout.empty() ? p.vpp : contents[0].sizes[3]};
    out_.iteration = contents.front().iteration;
    for (std::size_t i = 0; i < contents.size(); ++i) {
      const auto& content = contents[i];
      const auto& name = out_.stored.files[i];
      const auto add = [&](std::string message) { out_.findings.push_back({"rank", Finding::Severity::Error, name, std::move(message)}); };
      if (content.sizes != sizes)
        add(fmt::format("args say TP {} PP {} EP {} VPP {}; the first file's say TP {} PP {} EP {} VPP {}", content.sizes[0], content.sizes[1],
                        content.sizes[2], content.sizes[3], sizes[0], sizes[1], sizes[2], sizes[3]));
      for (const auto& contradiction : content.contradictions) add(contradiction);
      if (content.iteration != contents.front().iteration)
        add(fmt::format("iteration is {}; the first file's is {}", content.iteration.value_or(-1), contents.front().iteration.value_or(-1)));
      if (content.version != contents.front().version) add("checkpoint_version differs from the first file's");
      if (content.rank && content.world_size && p.pp > 0 && *content.world_size % p.pp == 0) check_rank(i, content, add);
    }
    refuse_foreign(contents);
  }

  /// An average of the weights, say: tensors that no target has a place for and that nobody asked to drop.
  void refuse_foreign(const std::vector<RankContent>& contents) {
    std::set<std::string> seen;
    for (std::size_t i = 0; i < contents.size(); ++i)
      for (const auto& key : contents[i].foreign) {
        if (!seen.insert(key).second) continue;
        if (std::any_of(options_.drop.begin(), options_.drop.end(), [&](const auto& pattern) { return glob(pattern, key); })) out_.not_carried.push_back({key, "--drop"});
        else out_.findings.push_back({"unexpected", Finding::Severity::Error, key, fmt::format("{} holds tensors under this key, which is none of Megatron's; --drop drops it", out_.stored.files[i])});
      }
    std::erase_if(out_.not_carried, [&](const Dropped& one) { return one.why != "--drop" && seen.contains(one.key); });
  }

  template <typename Add>
  void check_rank(std::size_t i, const RankContent& content, const Add& add) const {
    const auto& p = *out_.parallel;
    const auto per_stage = std::max<Index>(1, *content.world_size / p.pp);
    const auto r = *content.rank % per_stage, stage = *content.rank / per_stage;
    const auto tensor = r % p.tp, expert = (r / p.etp) % p.ep;
    if (stage != places_[i].stage || tensor != places_[i].cell.tensor || (p.ep > 1 && expert != places_[i].cell.expert))
      add(fmt::format("args.rank {} of {} is tensor rank {}, stage {}; the folder says tensor rank {}, stage {}", *content.rank,
                      *content.world_size, tensor, stage, places_[i].cell.tensor, places_[i].stage));
  }

  // --- from entries to shards -------------------------------------------------------------------------------------------

  void find_padded_vocabulary(const std::vector<RankContent>& contents) {
    for (const auto& content : contents)
      for (const auto& entry : content.entries)
        if (entry.tensor && entry.tensor->sizes.size() == 2 && (entry.key == "embedding.word_embeddings.weight" || entry.key == "output_layer.weight")) {
          padded_rows_ = entry.tensor->sizes[0] * out_.parallel->tp;
          out_.params["vocab"] = *padded_rows_;
          return;
        }
  }

  /// The global name; nullopt (and a finding) where the stage has no such layer.
  std::optional<std::string> global_key(const Place& place, const Entry& entry) {
    auto key = entry.key;
    if (key.starts_with(kLayers)) {
      const auto end = key.find('.', kLayers.size());
      Index local = -1;
      if (end != key.npos) std::from_chars(key.data() + kLayers.size(), key.data() + end, local);
      const auto& layers = pipeline_.at({place.stage, entry.chunk});
      if (local < 0 || local >= static_cast<Index>(layers.size())) {
        out_.findings.push_back({"unexpected", Finding::Severity::Error, place.folder + "/" + key,
                                 fmt::format("the stage's chunk {} holds {} layers by args", entry.chunk, layers.size())});
        return std::nullopt;
      }
      key = fmt::format("{}{}{}", kLayers, layers[static_cast<std::size_t>(local)], key.substr(end));
    }
    return global_expert(place, std::move(key));
  }

  std::string global_expert(const Place& place, std::string key) const {
    const auto experts = out_.params.find("experts");
    if (experts == out_.params.end() || out_.parallel->ep == 1) return key;
    const auto shift = place.cell.expert * (experts->second / out_.parallel->ep);
    const auto renumber = [&](std::size_t at) {
      auto end = at;
      while (end < key.size() && std::isdigit(static_cast<unsigned char>(key[end]))) ++end;
      Index local = 0;
      std::from_chars(key.data() + at, key.data() + end, local);
      if (end > at) key.replace(at, end - at, std::to_string(local + shift));
    };
    constexpr std::string_view sequential = "local_experts.";
    if (const auto at = key.find(sequential); at != key.npos) renumber(at + sequential.size());
    else if (key.find("mlp.experts.linear_fc") != key.npos)
      for (const std::string_view stem : {".weight", ".bias"})
        if (const auto at = key.rfind(stem); at != key.npos && at + stem.size() < key.size()) renumber(at + stem.size());
    return key;
  }

  /// GroupedMLP (before core 0.17) keeps a rank's experts in two tensors, matrix behind matrix, each transposed: views of one expert each,
  /// spelled as experts of their own. Empty where this is none.
  std::vector<Entry> experts_apart(const Entry& entry) const {
    const bool first = entry.key.ends_with("mlp.experts.weight1");
    const auto experts = out_.params.find("experts");
    if ((!first && !entry.key.ends_with("mlp.experts.weight2")) || !entry.tensor || experts == out_.params.end()) return {};
    const auto count = experts->second / out_.parallel->ep;
    const auto& both = *entry.tensor;
    const auto cut = first ? 1u : 0u;  // [hidden, experts · rows] and [experts · columns, hidden]
    if (count <= 0 || both.sizes.size() != 2 || shard::volume(both.sizes) == 0 || both.sizes[cut] % count != 0 || both.strides != shard::row_major(both.sizes)) return {};
    auto matrix = both.sizes;
    matrix[cut] /= count;
    std::vector<Entry> out;
    for (Index e = 0; e < count; ++e) {
      auto one = entry;
      one.key.replace(one.key.size() - std::string_view("weight1").size(), std::string::npos, fmt::format("local_experts.{}.linear_fc{}.weight", e, first ? 1 : 2));
      one.tensor->sizes = {matrix[1], matrix[0]};
      one.tensor->strides = {1, matrix[1]};
      one.tensor->offset += static_cast<std::uint64_t>(e * matrix[0] * matrix[1]) * size_of(both.dtype);
      out.push_back(std::move(one));
    }
    return out;
  }

  void add_rank(std::size_t index, const RankContent& content) {
    const auto& place = places_[index];
    std::map<std::string, std::uint32_t> streams;
    const auto add = [&](const Entry& entry) {
      auto key = global_key(place, entry);
      if (!key) return;
      if (!entry.tensor) {
        keep_extra(place, *key, entry);
        return;
      }
      const bool of_expert = key->find("experts.l") != key->npos && key->find("shared_experts.l") == key->npos;
      holders_[{place.stage, of_expert ? place.cell.expert : -1}][*key].insert(index);
      const bool tied_copy = *key == "output_layer.weight" && shard::holds("tied", out_.params);
      const bool late_copy = place.stage > 0 && *key == "embedding.word_embeddings.weight";
      if (tied_copy) key = "embedding.word_embeddings.weight";
      const auto [at, fresh] = streams.try_emplace(entry.tensor->storage, static_cast<std::uint32_t>(out_.stored.streams.size()));
      if (fresh) {
        out_.stored.streams.push_back({static_cast<std::uint32_t>(index), entry.record.offset, entry.record.size, std::nullopt, false});
        if (content.crcs_recorded) out_.stored.streams.back().crc32 = entry.record.crc32;
      }
      add_tensor(place, *key, *entry.tensor, at->second, tied_copy || late_copy);
    };
    for (const auto& entry : content.entries) {
      const auto apart = experts_apart(entry);
      if (apart.empty()) add(entry);
      for (const auto& one : apart) add(one);
      if (!apart.empty() && out_.notes.empty()) out_.notes.push_back("experts are stored as GroupedMLP keeps them (mlp.experts.weight1, weight2), which core 0.17 gave up; mp_rank is written with one tensor an expert (local_experts)");
    }
    if (content.crcs_recorded)
      for (const auto& record : content.others) out_.stored.streams.push_back({static_cast<std::uint32_t>(index), record.offset, record.size, record.crc32, false});
  }

  void keep_extra(const Place& place, const std::string& key, const Entry& entry) {
    auto& state = *out_.megatron;
    auto name = key == "output_layer._extra_state" ? std::string("output") : extra_state_name(table_, out_.params, key);
    if (name.empty()) {
      if (unknown_extra_.insert(key).second) out_.not_carried.push_back({key, "extra state of a module that this family does not have"});
      return;
    }
    if (entry.extra.kind != ExtraState::Kind::None) state.te = true;
    const auto [kept, fresh] = state.extra.try_emplace(std::move(name), entry.extra);
    if (!fresh && !same(kept->second, entry.extra) && differing_extra_.insert(key).second)
      out_.not_carried.push_back({fmt::format("{}/{}", place.folder, key), "differs from the first rank's extra state, which is kept, as Megatron keeps it"});
  }

  void add_tensor(const Place& place, const std::string& key, const StoredTensor& local, std::uint32_t stream, bool copy) {
    auto& tensor = out_.stored.tensors[key];
    const auto match = table_.match(key, out_.params);
    const auto item = static_cast<Index>(size_of(local.dtype));
    shard::Shape stride = local.strides;
    for (auto& step : stride) step *= item;
    if (!match) {
      if (tensor.key.empty()) tensor = {key, local.dtype, local.sizes, local.sizes, {}, false};
      tensor.shards.push_back({shard::whole(local.sizes), {stream, local.offset, stride}, replica(place, copy, true)});
      return;
    }
    if (match->row->dialects.find('l') == std::string::npos) out_.megatron->te = true;
    const auto full = factors(*match->row, out_.params).stored();
    auto [dim, ways, rank] = cutting(*match->row, place);
    if (dim >= 0 && local.sizes == full) ways = 1, rank = 0, dim = -1;  // e.g. TE's whole MLA down projections
    auto expected = full;
    if (dim >= 0 && full[static_cast<std::size_t>(dim)] % (ways * match->row->pieces) == 0) expected[static_cast<std::size_t>(dim)] /= ways;
    if (tensor.key.empty()) tensor = {key, local.dtype, full, full, {}, match->row->vocabulary};
    if (local.sizes != expected || local.dtype != tensor.dtype) {
      out_.findings.push_back({local.sizes != expected ? "shape" : "dtype", Finding::Severity::Error, key,
                               local.sizes != expected
                                   ? fmt::format("shape in {} is {}; args give {}", place.folder, shard::to_string(local.sizes), shard::to_string(expected))
                                   : fmt::format("{} in {}; elsewhere {}", shard::name(local.dtype), place.folder, shard::name(tensor.dtype))});
      return;
    }
    const auto id = replica(place, copy, dim < 0);
    const bool old_rows = version_ < 2.0 && match->row->dims.starts_with("groups ratio+2 head");
    if (old_rows && out_.params.at("ratio") == 1) return add_old_qkv(tensor, local, stride, stream, rank, id);
    if (old_rows && !std::exchange(grouped_before_groups_, true))
      out_.findings.push_back({"shape", Finding::Severity::Error, "checkpoint_version",
                               fmt::format("is {} (absent means 0), which knows no query groups; args say {} of them for {} heads", version_, out_.params.at("groups"), out_.params.at("heads"))});
    if (dim < 0) {
      tensor.shards.push_back({shard::whole(full), {stream, local.offset, stride}, id});
      return;
    }
    auto at = local.offset;
    for (const auto& side : shard::cut(full[static_cast<std::size_t>(dim)], match->row->pieces, ways, rank)) {
      auto box = shard::whole(full);
      box.lo[static_cast<std::size_t>(dim)] = side.lo;
      box.size[static_cast<std::size_t>(dim)] = side.size;
      tensor.shards.push_back({std::move(box), {stream, at, stride}, id});
      at += static_cast<std::uint64_t>(side.size * stride[static_cast<std::size_t>(dim)]);
    }
  }

  struct Cutting {
    int dim;
    Index ways, rank;
  };
  Cutting cutting(const shard::Row& row, const Place& place) const {
    const auto& p = *out_.parallel;
    if (row.cut < 0) return {-1, 1, 0};
    const Cutting out = row.ways == shard::Ways::ExpertTensor ? Cutting{row.cut, p.etp, place.cell.expert_tensor} : Cutting{row.cut, p.tp, place.cell.tensor};
    return out.ways > 1 ? out : Cutting{-1, 1, 0};
  }

  shard::ReplicaId replica(const Place& place, bool copy, bool whole) const {
    return {copy ? 1 : 0, whole ? static_cast<int>(place.cell.tensor) : 0, static_cast<int>(place.cell.expert)};
  }

  /// Before version 2 a rank's rows were [q|k|v, head, lane] (0) or [head, lane, q|k|v] (1) instead of [head, q|k|v, lane].
  void add_old_qkv(shard::ShardedTensor& tensor, const StoredTensor& local, const shard::Shape& stride, std::uint32_t stream,
                   Index rank, const shard::ReplicaId& id) {
    const auto head = out_.params.at("head"), heads = local.sizes[0] / (3 * head), row = stride[0];
    for (Index i = 0; i < heads; ++i)
      for (Index c = 0; c < 3; ++c) {
        auto box = shard::whole(tensor.global_shape);
        box.lo[0] = ((rank * heads + i) * 3 + c) * head;
        box.size[0] = head;
        auto step = stride;
        const auto first = version_ == 0 ? (c * heads + i) * head : i * head * 3 + c;
        if (version_ != 0) step[0] = 3 * row;
        tensor.shards.push_back({std::move(box), {stream, local.offset + static_cast<std::uint64_t>(first * row), std::move(step)}, id});
      }
  }

  /// Every layer of every stage came with at least one tensor.
  void check_layers() {
    for (Index layer = 0; layer < need_layers(); ++layer) {
      const auto prefix = fmt::format("{}{}.", kLayers, layer);
      const auto at = out_.stored.tensors.lower_bound(prefix);
      if (at == out_.stored.tensors.end() || !at->first.starts_with(prefix))
        out_.findings.push_back({"missing", Finding::Severity::Error, prefix.substr(0, prefix.size() - 1), "no rank file holds this layer"});
    }
  }

  /// What one rank of a stage holds, whole or its part, every rank of that stage does; of experts, every rank of their group.
  void check_company() {
    for (const auto& [group, keys] : holders_)
      for (const auto& [key, holders] : keys)
        for (std::size_t i = 0; i < places_.size(); ++i)
          if (places_[i].stage == group.first && (group.second < 0 || places_[i].cell.expert == group.second) && !holders.contains(i))
            out_.findings.push_back({"missing", Finding::Severity::Error, key, fmt::format("{} does not hold it; other ranks of its stage do", places_[i].folder)});
  }

  const OpenOptions& options_;
  shard::Table table_;
  Checkpoint out_;
  std::vector<RankFile> found_;
  std::vector<Place> places_;
  shard::Pipeline pipeline_;
  std::optional<Index> padded_rows_;
  std::set<std::string> unknown_extra_, differing_extra_;
  std::map<std::string_view, std::string> shaping_;  ///< of the first file's args
  bool grouped_before_groups_ = false;
  std::map<std::pair<Index, Index>, std::map<std::string, std::set<std::size_t>>> holders_;  ///< by stage and expert rank (-1: all), by key
  double version_ = 0;
};

}  // namespace

bool is_mp_rank(const fs::path& folder) {
  for (const auto& entry : fs::directory_iterator(folder))
    if (!numbers_of(entry.path().filename().string()).empty()) return true;
  return false;
}

Checkpoint open_mp_rank(const fs::path& folder, const OpenOptions& options) { return LegacyReader(folder, options).open(); }

}  // namespace formats::megatron
