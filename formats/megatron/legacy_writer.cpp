// mp_rank: for every rank the dict that its modules would save, with layers numbered from 0 in each chunk.
#include "formats/megatron/args.h"
#include "formats/megatron/writers.h"
#include "libshard/error.h"
#include "libshard/families/megatron.h"

#include <algorithm>

namespace formats::megatron {
namespace {

using shard::Cell;
using shard::Code;
using shard::Index;
using shard::Wanted;

/// One entry of one rank's model dict.
struct Slot {
  std::string key;                 ///< as the rank's modules name it
  const Wanted* wanted = nullptr;  ///< nullptr for an extra state
  const ExtraState* extra = nullptr;
  bool copy = false;               ///< of the embedding, on a later stage
  Index chunk = 0;
};

class LegacyWriter {
 public:
  LegacyWriter(const Checkpoint& source, const Model& model, Target& target)
      : source_(source), model_(model), target_(target), writer_(*target.writer), extra_(extra_states(source, model, false)) {
    for (const auto& one : model.wanted)
      if (one.row->stage == shard::Stage::Embedding && one.row->vocabulary) embedding_ = &one;
  }

  void write() {
    folder_ = iteration_folder(writer_, source_);
    const auto all = cells(model_.parallel);
    const Index per_stage = ranks_per_stage(model_.parallel);
    for (Index stage = 0; stage < model_.parallel.pp; ++stage)
      for (const auto& cell : all) rank_file(cell, stage, stage * per_stage + cell.rank_in_stage, per_stage * model_.parallel.pp);
    describe_logical(target_, source_, model_);
    for (const auto& [stream, bytes] : constants_) writer_.write(stream, 0, std::as_bytes(std::span(bytes->data(), bytes->size())));
    for (const auto& name : dropped_args_) target_.dropped.push_back({"args." + name, "torch.load(weights_only=True) refuses a file that names its class"});
  }

 private:
  std::string rank_folder(const Cell& cell, Index stage) const {
    auto out = fmt::format("mp_rank_{:02d}", cell.tensor);
    if (model_.parallel.pp > 1) out += fmt::format("_{:03d}", stage);
    if (model_.parallel.ep > 1) out += fmt::format("_{:03d}", cell.expert);
    return out;
  }

  bool on_rank(const Wanted& wanted, const Cell& cell) const {
    return wanted.match.expert < 0 || wanted.match.expert / (model_.experts / model_.parallel.ep) == cell.expert;
  }

  /// The key with layer and expert numbers local to the rank.
  std::string local_key(const Wanted& wanted, shard::Chunk chunk) const {
    auto layer = wanted.match.layer, expert = wanted.match.expert;
    if (layer >= 0) layer -= model_.pipeline.at(chunk).front();
    if (expert >= 0) expert %= model_.experts / model_.parallel.ep;
    return shard::spell(wanted.row->key, layer, expert, wanted.match.depth);
  }

  std::vector<Slot> slots(const Cell& cell, Index stage) const {
    std::vector<Slot> out;
    const auto& pipeline = model_.pipeline;
    for (std::size_t i = 0; i < model_.wanted.size(); ++i) {
      const auto& wanted = model_.wanted[i];
      const auto chunk = chunk_of(model_, wanted);
      if (chunk.stage != stage || !on_rank(wanted, cell)) continue;
      out.push_back({local_key(wanted, chunk), &wanted, nullptr, false, chunk.chunk});
      add_extra(out, i, chunk);
    }
    const bool mtp_copy = pipeline.mtp_layers > 0 && pipeline.mtp != pipeline.embedding && pipeline.mtp.stage == stage;
    if (mtp_copy && embedding_) out.insert(out.begin(), {embedding_->key, embedding_, nullptr, true, pipeline.mtp.chunk});
    if (model_.tied && embedding_ && pipeline.output.stage == stage && pipeline.output != pipeline.embedding)
      out.push_back({"output_layer.weight", embedding_, nullptr, true, pipeline.output.chunk});
    if (const auto found = source_.megatron->extra.find("output"); found != source_.megatron->extra.end() && pipeline.output.stage == stage)
      out.push_back({"output_layer._extra_state", nullptr, &found->second, false, pipeline.output.chunk});
    return out;
  }

  /// A module's extra state stands behind its last tensor.
  void add_extra(std::vector<Slot>& out, std::size_t i, shard::Chunk chunk) const {
    const auto module_of = [](const std::string& key) { return key.substr(0, key.rfind('.')); };
    const auto& key = model_.wanted[i].key;
    const auto module = module_of(key);
    if (i + 1 < model_.wanted.size() && module_of(model_.wanted[i + 1].key) == module) return;
    const auto found = extra_.find(module);
    if (found == extra_.end()) return;
    out.push_back({module_of(out.back().key) + "._extra_state", nullptr, &found->second, false, chunk.chunk});
  }

  void rank_file(const Cell& cell, Index stage, Index rank, Index world) {
    const auto file = writer_.folder().add(folder_ + rank_folder(cell, stage) + "/model_optim_rng.pt");
    const auto all = slots(cell, stage);
    pickle::Graph g(1 << 16);
    std::vector<std::uint64_t> storages;
    std::vector<pickle::Ref> models;
    std::vector<std::uint32_t> storage_of(all.size());
    for (Index chunk = 0; chunk < model_.parallel.vpp; ++chunk) {
      std::vector<pickle::Ref> entries;
      for (std::size_t i = 0; i < all.size(); ++i) {
        if (all[i].chunk != chunk) continue;
        entries.push_back(g.text(all[i].key));
        storage_of[i] = static_cast<std::uint32_t>(storages.size());
        entries.push_back(node(g, all[i], cell, storages));
      }
      const auto dict = g.object(g.symbol("collections", "OrderedDict"), g.empty_tuple(), false);
      g.append_entries(dict, entries);
      models.push_back(g.text(model_.parallel.vpp > 1 ? "model" + std::to_string(chunk) : std::string("model")));
      models.push_back(dict);
    }
    const auto added = writer_.add_archive(file, 0, "model_optim_rng", pickle::write(g, top_dict(g, models, rank, world), 2), storages);
    writer_.folder().resize(file, added.size);
    for (std::size_t i = 0; i < all.size(); ++i) {
      if (all[i].wanted) add_shards(all[i], cell, added.first_stream + storage_of[i]);
      else if (all[i].extra->kind == ExtraState::Kind::Tensor && !all[i].extra->bytes.empty())
        constants_.push_back({added.first_stream + storage_of[i], &all[i].extra->bytes});
    }
  }

  pickle::Ref node(pickle::Graph& g, const Slot& slot, const Cell& cell, std::vector<std::uint64_t>& storages) const {
    const auto storage = std::to_string(storages.size());
    if (slot.extra) {
      if (slot.extra->kind == ExtraState::Kind::Tensor) storages.push_back(slot.extra->bytes.size());
      return extra_node(g, *slot.extra, storage);
    }
    const auto shape = local_shape(*slot.wanted, cell);
    storages.push_back(static_cast<std::uint64_t>(shard::volume(shape)) * size_of(slot.wanted->dtype));
    return tensor_node(g, slot.wanted->dtype, storage, shape);
  }

  shard::Shape local_shape(const Wanted& wanted, const Cell& cell) const {
    auto shape = wanted.shape;
    if (const auto side = side_of(*wanted.row, model_.parallel, cell); side.dim >= 0) {
      Index rows = 0;
      for (const auto& part : shard::cut(shape[static_cast<std::size_t>(side.dim)], wanted.row->pieces, side.ways, side.rank)) rows += part.size;
      shape[static_cast<std::size_t>(side.dim)] = rows;
    }
    return shape;
  }

  pickle::Ref top_dict(pickle::Graph& g, const std::vector<pickle::Ref>& models, Index rank, Index world) {
    const auto& state = *source_.megatron;
    std::vector<pickle::Ref> entries{
        g.text("args"), copy_args(g, *state.common, state.args, {model_.parallel, target_.padded_vocab, rank, world, "torch", model_.pipeline.mtp_layers, vocab_multiple(model_), model_.dtype, model_.params}, Audience::Torch, dropped_args_),
        g.text("checkpoint_version"), g.real(3.0)};
    if (source_.iteration) entries.insert(entries.end(), {g.text("iteration"), g.integer(*source_.iteration)});
    entries.insert(entries.end(), models.begin(), models.end());
    for (const auto& [key, value] : state.items)
      if (key != "content_metadata") entries.insert(entries.end(), {g.text(key), g.import(*state.common, value)});
    return g.dict(entries);
  }

  void add_shards(const Slot& slot, const Cell& cell, std::uint32_t stream) {
    const auto& wanted = *slot.wanted;
    auto& tensor = writer_.described().tensors[wanted.key];
    if (tensor.key.empty()) tensor = {wanted.key, wanted.dtype, wanted.shape, wanted.shape, {}, wanted.row->vocabulary};
    const auto item = static_cast<Index>(size_of(wanted.dtype));
    auto stride = shard::row_major(local_shape(wanted, cell));
    for (auto& step : stride) step *= item;
    const auto side = side_of(*wanted.row, model_.parallel, cell);
    const shard::ReplicaId id{slot.copy ? 1 : 0, side.dim < 0 ? static_cast<int>(cell.tensor) : 0, static_cast<int>(cell.expert)};
    if (side.dim < 0) {
      tensor.shards.push_back({shard::whole(wanted.shape), {stream, 0, stride}, id});
      return;
    }
    const auto d = static_cast<std::size_t>(side.dim);
    std::uint64_t at = 0;
    for (const auto& part : shard::cut(wanted.shape[d], wanted.row->pieces, side.ways, side.rank)) {
      auto box = shard::whole(wanted.shape);
      box.lo[d] = part.lo;
      box.size[d] = part.size;
      tensor.shards.push_back({std::move(box), {stream, at, stride}, id});
      at += static_cast<std::uint64_t>(part.size * stride[d]);
    }
  }

  const Checkpoint& source_;
  const Model& model_;
  Target& target_;
  LocalWriter& writer_;
  std::map<std::string, ExtraState> extra_;
  const Wanted* embedding_ = nullptr;
  std::string folder_;
  std::set<std::string> dropped_args_;
  std::vector<std::pair<std::uint32_t, const std::string*>> constants_;  ///< bytes of extra states, by stream
};

}  // namespace

void create_mp_rank(const std::filesystem::path& path, const Checkpoint& source, const TargetOptions& options, Target& target) {
  const bool local = !(source.format == "mp_rank" && options.keep_spelling) && source.megatron && !source.megatron->te;
  const auto model = model_for(source, options, options.keep_spelling ? "lt" : local ? "l" : "t");
  target.padded_vocab = model.params.at("vocab");
  target.writer = make_writer(path, options);
  LegacyWriter(source, model, target).write();
  target.carried = {"args", "checkpoint_version", "iteration"};
  for (const auto& [key, value] : source.megatron->items)
    if (key != "content_metadata") target.carried.push_back(key);
  if (!source.megatron->extra.empty()) target.carried.push_back(fmt::format("{} extra states", source.megatron->extra.size()));
}

}  // namespace formats::megatron
