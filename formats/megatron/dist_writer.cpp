// torch_dist: one DCP item per chunk of the target's grid, in one or two files per rank, and a common.pt.
#include "formats/megatron/common_state.h"
#include "formats/megatron/writers.h"
#include "formats/torch_dcp/metadata.h"
#include "libshard/error.h"
#include "libshard/families/megatron.h"

#include <algorithm>

namespace formats::megatron {
namespace {

using shard::Cell;
using shard::Index;
using shard::Wanted;

/// A chunk or object of one rank file.
struct PendingItem {
  std::string key;         ///< as stored: without stacked numbers
  shard::Box box;          ///< with stacked dimensions; empty for an object
  const Wanted* wanted = nullptr;
  shard::Box local;        ///< the box without stacked dimensions
  const ExtraState* extra = nullptr;

  std::uint64_t bytes() const { return wanted ? static_cast<std::uint64_t>(shard::volume(box.size)) * size_of(wanted->dtype) : extra->bytes.size(); }
};

constexpr std::uint64_t kTwoFiles = 64 << 20;

class DistWriter {
 public:
  DistWriter(const Checkpoint& source, const Model& model, Target& target)
      : source_(source), model_(model), target_(target), writer_(*target.writer), extra_(extra_states(source, model, true)) {}

  void write() {
    folder_ = iteration_folder(writer_, source_);
    collect();
    for (auto& [rank, items] : files_) rank_files(rank, items);
    small_file("common.pt", common_pickle(source_, model_, target_));
    const auto metadata = torch_dcp::write_metadata(metadata_);
    plain_file(".metadata", metadata);
    plain_file("metadata.json", R"({"sharded_backend": "torch_dist", "sharded_backend_version": 1})");
    describe_logical(target_, source_, model_);
  }

 private:
  void collect() {
    const auto all = cells(model_.parallel);
    const Index per_stage = ranks_per_stage(model_.parallel);
    for (std::size_t i = 0; i < model_.wanted.size(); ++i) {
      const auto& wanted = model_.wanted[i];
      const auto stage = chunk_of(model_, wanted).stage;
      std::set<Index> seen;
      for (const auto& cell : all) {
        if (wanted.match.expert >= 0 && wanted.match.expert / (model_.experts / model_.parallel.ep) != cell.expert) continue;
        const auto side = side_of(*wanted.row, model_.parallel, cell);
        if (!seen.insert(side.rank).second) continue;
        add_chunks(wanted, side, files_[stage * per_stage + cell.rank_in_stage]);
      }
      add_extra(i, files_[stage * per_stage]);
    }
  }

  void add_chunks(const Wanted& wanted, const shard::Side& side, std::vector<PendingItem>& items) {
    const auto pieces = side.dim < 0 ? std::vector<shard::Cut>{{0, 0}}
                                     : shard::cut(wanted.shape[static_cast<std::size_t>(side.dim)], wanted.row->pieces, side.ways, side.rank);
    for (const auto& piece : pieces) {
      auto local = shard::whole(wanted.shape);
      if (side.dim >= 0) local.lo[static_cast<std::size_t>(side.dim)] = piece.lo, local.size[static_cast<std::size_t>(side.dim)] = piece.size;
      items.push_back({stored_key(wanted), stacked(wanted, local), &wanted, local, nullptr});
    }
  }

  bool stacks_layers(const Wanted& wanted) const { return model_.stacked && wanted.match.layer >= 0; }
  bool stacks_experts(const Wanted& wanted) const { return wanted.match.expert >= 0; }

  std::string stored_key(const Wanted& wanted) const {
    auto key = wanted.row->key;
    const auto cut_out = [&](std::string_view number) {
      if (const auto at = key.find(number); at != key.npos) key.erase(at, number.size());
    };
    if (stacks_layers(wanted)) cut_out("{l}.");
    if (stacks_experts(wanted)) cut_out("{e}.");
    return shard::spell(key, wanted.match.layer, wanted.match.expert, wanted.match.depth);
  }

  shard::Box stacked(const Wanted& wanted, shard::Box box) const {
    if (stacks_experts(wanted)) box.lo.insert(box.lo.begin(), wanted.match.expert), box.size.insert(box.size.begin(), 1);
    if (stacks_layers(wanted)) box.lo.insert(box.lo.begin(), wanted.match.layer), box.size.insert(box.size.begin(), 1);
    return box;
  }

  shard::Shape stacked_shape(const Wanted& wanted) const {
    auto shape = wanted.shape;
    if (stacks_experts(wanted)) shape.insert(shape.begin(), model_.experts);
    if (stacks_layers(wanted)) shape.insert(shape.begin(), model_.layers);
    return shape;
  }

  void add_extra(std::size_t i, std::vector<PendingItem>& items) {
    const auto& wanted = model_.wanted[i];
    if (!wanted.key.ends_with(".weight")) return;
    const auto found = extra_.find(wanted.key.substr(0, wanted.key.size() - std::string_view(".weight").size()));
    if (found == extra_.end()) return;
    auto key = stored_key(wanted);
    key.replace(key.size() - std::string_view("weight").size(), std::string::npos, "_extra_state");
    std::string at, of;
    const auto add = [&](Index index, Index count) {
      at += (at.empty() ? "" : ".") + std::to_string(index);
      of += (of.empty() ? "" : ".") + std::to_string(count);
    };
    if (stacks_layers(wanted)) add(wanted.match.layer, model_.layers);
    if (stacks_experts(wanted)) add(wanted.match.expert, model_.experts);
    if (at.empty()) add(0, 1);
    items.push_back({key + "/shard_" + at + "_" + of, {}, nullptr, {}, &found->second});
  }

  /// Ranks with much to write have two files, as Megatron's writer (thread_count 2) leaves them: a file system lets one
  /// thread at a time extend a file.
  void rank_files(Index rank, std::vector<PendingItem>& items) {
    std::stable_sort(items.begin(), items.end(), [](const PendingItem& a, const PendingItem& b) {
      return a.key != b.key ? a.key < b.key : a.box.lo < b.box.lo;
    });
    std::uint64_t all = 0;
    for (const auto& item : items) all += item.bytes();
    std::vector<PendingItem> files[2];
    std::uint64_t filled[2] = {};
    for (auto& item : items) {
      const int to = all >= kTwoFiles && filled[1] < filled[0];
      filled[to] += item.bytes();
      files[to].push_back(std::move(item));
    }
    for (int i = 0; i < 2; ++i)
      if (i == 0 || !files[i].empty()) rank_file(fmt::format("__{}_{}.distcp", rank, i), files[i]);
  }

  void rank_file(const std::string& name, const std::vector<PendingItem>& items) {
    const auto file = writer_.folder().add(folder_ + name);
    const auto in_metadata = static_cast<std::uint32_t>(metadata_.files.size());
    metadata_.files.push_back(name);
    std::uint64_t at = 0;
    for (const auto& item : items) {
      pickle::Graph g;
      std::vector<std::uint64_t> storages;
      pickle::Ref root;
      if (item.wanted) {
        storages.push_back(item.bytes());
        root = tensor_node(g, item.wanted->dtype, "0", item.box.size);
      } else {
        if (item.extra->kind == ExtraState::Kind::Tensor) storages.push_back(item.extra->bytes.size());
        root = g.list({extra_node(g, *item.extra, "0")});
      }
      const auto added = writer_.add_archive(file, at, "archive", pickle::write(g, root, 2), storages);
      if (item.wanted) add_shard(item, added.first_stream, {in_metadata, at, added.size, false});
      else {
        metadata_.bytes[item.key] = {in_metadata, at, added.size, false};
        if (!storages.empty() && storages[0] > 0)
          writer_.write(added.first_stream, 0, std::as_bytes(std::span(item.extra->bytes.data(), item.extra->bytes.size())));
      }
      at += added.size;
    }
    writer_.folder().resize(file, at);
  }

  void add_shard(const PendingItem& item, std::uint32_t stream, torch_dcp::Item where) {
    const auto& wanted = *item.wanted;
    const auto shape = stacked_shape(wanted);
    auto& described = writer_.described().tensors[item.key];
    if (described.key.empty()) described = {item.key, wanted.dtype, shape, shape, {}, wanted.row->vocabulary};
    auto stride = shard::row_major(item.box.size);
    for (auto& step : stride) step *= static_cast<Index>(size_of(wanted.dtype));
    described.shards.push_back({item.box, {stream, 0, stride}, {}});
    auto& tensor = metadata_.tensors.try_emplace(item.key, torch_dcp::Tensor{wanted.dtype, shape, {}}).first->second;
    tensor.chunks.push_back({item.box, where});
  }

  void small_file(const std::string& name, const std::string& pickle) {
    const auto file = writer_.folder().add(folder_ + name);
    const auto added = writer_.add_archive(file, 0, name.substr(0, name.find('.')), pickle, {});
    writer_.folder().resize(file, added.size);
  }
  void plain_file(const std::string& name, const std::string& text) {
    writer_.folder().write(writer_.folder().add(folder_ + name), 0, text);
  }

  const Checkpoint& source_;
  const Model& model_;
  Target& target_;
  LocalWriter& writer_;
  std::map<std::string, ExtraState> extra_;
  std::string folder_;
  std::map<Index, std::vector<PendingItem>> files_;
  torch_dcp::Metadata metadata_;
};

}  // namespace

void create_torch_dist(const std::filesystem::path& path, const Checkpoint& source, const TargetOptions& options, Target& target) {
  const auto model = model_for(source, options, "d");
  target.padded_vocab = model.params.at("vocab");
  target.writer = make_writer(path, options);
  DistWriter(source, model, target).write();
  target.carried = {"args", "checkpoint_version", "iteration"};
  for (const auto& [key, value] : source.megatron->items) target.carried.push_back(key);
  if (!source.megatron->extra.empty()) target.carried.push_back(fmt::format("{} extra states", source.megatron->extra.size()));
}

}  // namespace formats::megatron
