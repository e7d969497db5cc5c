// Ranks of one layout keep their ops, their weights' places and their ends of NCCL.
#include "gpu/model/language_device.h"

#include "gpu/model/device_ops.h"
#include "gpu/model/load_weights.h"
#include "gpu/model/memory_plan.h"
#include "gpu/model/nccl_comm.h"
#include "gpu/model/staged_comm.h"
#include "libshard/error.h"
#include "lm/message.h"

#include <algorithm>
#include <deque>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <tuple>
#include <utility>

namespace gpu {
namespace {

class Devices : public lm::Device {
 public:
  explicit Devices(LanguageDeviceOptions options) : options_(std::move(options)) {
    shard::require(!options_.devices.empty(), shard::Code::Device, [] { return std::string("device: none was given"); });
    const auto all = probe().devices;  // without taking any
    for (const auto device : options_.devices) {
      const auto found = std::find_if(all.begin(), all.end(), [&](const DeviceInfo& one) { return one.index == device; });
      names_.push_back(found == all.end() ? device_info(device).name : found->name);
    }
  }

  std::string name() const override {
    std::string out;
    for (std::size_t i = 0; i < options_.devices.size(); ++i) out += fmt::format("{}cuda:{} ({})", i ? ", " : "", options_.devices[i], names_[i]);
    return out;
  }
  bool tf32() const override { return options_.tf32; }
  std::vector<std::string> notes() const override {
    const auto here = std::find_if(ranks_.begin(), ranks_.end(), [](const auto& rank) { return rank != nullptr; });
    auto out = here == ranks_.end() ? std::vector<std::string>{} : (*here)->notes();
    if (!transport_.empty()) out.push_back(transport_);
    return out;
  }

  void prepare(const lm::Ranks& layout, const shard::TransformerConfig& config, const std::vector<lm::StagePlan>& stages) override {
    const auto count = static_cast<std::size_t>(layout.tensor * layout.pipeline);
    const bool same = layout.tensor == layout_.tensor && layout.pipeline == layout_.pipeline && layout.compute == layout_.compute && ranks_.size() == count;
    if (!same) {
      weights_.clear();
      held_.clear();
      ranks_.clear();
    }
    // What was recorded holds the old model's numbers: epsilons, scales, angles.
    if (config != config_)
      for (auto& rank : ranks_)
        if (rank) rank->forget_recorded();
    config_ = config;
    layout_ = layout;
    plans_ = stages;
    for (auto& plan : plans_) plan.uses.insert(plan.uses.end(), plan.tables.begin(), plan.tables.end());
    if (const bool failed = std::exchange(failed_, false); failed || !same) meet();
    for (const auto device : std::set(options_.devices.begin(), options_.devices.end())) {
      Demand demand;
      std::uint64_t mine = 0;  // taken already, and about to be used again
      bool used = false;
      for (int rank = 0; rank < layout.tensor * layout.pipeline; ++rank) {
        if (!layout.here(rank) || device_of(rank) != device) continue;
        used = true;
        const auto& stage = stages[static_cast<std::size_t>(rank / layout.tensor)];
        for (const auto& [name, part] : stage.parts[static_cast<std::size_t>(rank % layout.tensor)]) demand.weights += part.bytes();
        demand.activations += activation_bytes(config, layout, stage.rows);
        demand.least_activations += activation_bytes(config, layout, 1);
        const auto groups = static_cast<std::uint64_t>(by_nccl(Axis::Tensor, rank / layout.tensor)) + static_cast<std::uint64_t>(by_nccl(Axis::Pipeline, rank % layout.tensor));
        const auto stays = Matmul::kWorkspace + groups * kNcclBuffers;
        demand.libraries += stays;
        if (by_nccl(Axis::Tensor, rank / layout.tensor)) demand.libraries += 2 * kLoadBatch;
        if (same) mine += ranks_[static_cast<std::size_t>(rank)]->held() + stays + held_[static_cast<std::size_t>(rank)].size();
      }
      if (!used) continue;
      const auto info = device_info(device);
      require_fits(demand, (options_.memory ? options_.memory : info.free / 10 * 9 + mine), fmt::format("cuda:{} ({})", device, info.name), layout);
    }
    for (int rank = static_cast<int>(ranks_.size()); rank < layout.tensor * layout.pipeline; ++rank) {
      // What goes through the host in between cannot be recorded.
      const OpsOptions ops{device_of(rank), layout.compute, options_.attention, options_.tf32, options_.graphs && layout.tensor == 1, options_.cublaslt, options_.cudnn};
      ranks_.push_back(layout.here(rank) ? std::make_unique<DeviceOps>(ops) : nullptr);
      auto& held = held_.emplace_back();
      if (ranks_.back()) weights_.emplace(rank, RankWeights(held, *ranks_.back()));
    }
  }

  std::vector<lm::WeightUse> takes(int stage) const override {
    const auto& plan = plans_[static_cast<std::size_t>(stage)];
    std::vector<lm::WeightUse> out;
    for (std::size_t u = 0; u < plan.uses.size(); ++u) {
      auto use = plan.uses[u];
      use.times = by_nccl(Axis::Tensor, stage) ? 1 : static_cast<int>(std::count_if(plan.parts.begin(), plan.parts.end(), [&](const auto& parts) { return needs(parts, use); }));
      if (layout_.here(stage * layout_.tensor + plan.readers[u]) || layout_.tensor == 1) out.push_back(use);
    }
    return out;
  }

  lm::Ops& ops(int stage, int tensor_rank) override {
    auto& mine = of(stage, tensor_rank);
    mine.enter();
    return mine;
  }

  std::unique_ptr<lm::Comm> comm(lm::Group& group, Axis axis, int stage, int tensor_rank) override {
    auto& mine = of(stage, tensor_rank);
    const int member = group.size() == 1 ? 0 : axis == Axis::Tensor ? tensor_rank : stage;
    if (auto* peers = communicator(axis, stage, tensor_rank, layout_.processes ? nullptr : std::make_shared<Threads>(group, member))) return std::make_unique<NcclComm>(mine, *peers);
    return std::make_unique<StagedComm>(group, member, mine);
  }

  void fail() override {
    const std::lock_guard lock(mutex_);
    for (auto& [key, peers] : communicators_)
      if (peers) peers->fail();
    failed_ = true;
  }

  lm::Weights& weights(lm::WeightStream& stream, int stage, int tensor_rank) override {
    auto& mine = of(stage, tensor_rank);
    const auto& plan = plans_[static_cast<std::size_t>(stage)];
    const auto rank = static_cast<std::size_t>(stage * layout_.tensor + tensor_rank);
    if (!held_[rank].hold(plan.parts[static_cast<std::size_t>(tensor_rank)], mine.stream())) mine.forget_recorded();
    load_weights(stream, plan, tensor_rank, held_[rank], made({Axis::Tensor, stage, tensor_rank}), mine.stream());
    return weights_.at(static_cast<int>(rank));
  }

 private:
  int device_of(int rank) const { return options_.devices[static_cast<std::size_t>(rank) % options_.devices.size()]; }
  DeviceOps& of(int stage, int tensor_rank) const { return *ranks_[static_cast<std::size_t>(stage * layout_.tensor + tensor_rank)]; }

  /// The members of a group along `axis`, which all have that number along the other one.
  std::vector<int> members(Axis axis, int group) const {
    std::vector<int> out;
    for (int m = 0; m < (axis == Axis::Tensor ? layout_.tensor : layout_.pipeline); ++m) out.push_back(axis == Axis::Tensor ? group * layout_.tensor + m : m * layout_.tensor + group);
    return out;
  }
  bool by_nccl(Axis axis, int group) const { return ids_.contains({axis, group}); }

  /// What each rank works on. Those of other processes tell.
  std::vector<RankDevice> boards() {
    load_nccl();
    std::vector<RankDevice> out;
    for (int rank = 0; rank < layout_.tensor * layout_.pipeline; ++rank)
      out.push_back(layout_.here(rank) ? RankDevice{device_info(device_of(rank)).id, nccl_ ? nccl_->version() : "", no_nccl_} : RankDevice{});
    if (!layout_.processes) return out;
    const auto& mine = out[static_cast<std::size_t>(layout_.processes->rank())];
    lm::MessageWriter told;
    told(mine.board, mine.nccl, mine.why_no_nccl);
    const auto all = layout_.processes->all_gather(told.text());
    for (std::size_t r = 0; r < out.size(); ++r) {
      lm::MessageReader from(all[r]);
      from(out[r].board, out[r].nccl, out[r].why_no_nccl);
    }
    return out;
  }

  /// An id for each of these groups, made by the process of its first rank.
  void make_ids(const std::vector<std::pair<Axis, int>>& groups) {
    std::string told;
    for (const auto& [axis, group] : groups)
      if (layout_.here(members(axis, group)[0])) {
        const auto id = ids_[{axis, group}] = nccl_->make_id();
        told.append(id.begin(), id.end());
      }
    if (!layout_.processes) return;
    const auto all = layout_.processes->all_gather(told);
    std::vector<std::size_t> at(all.size());
    for (const auto& [axis, group] : groups) {
      const auto from = static_cast<std::size_t>(members(axis, group)[0]);
      auto& id = ids_[{axis, group}];
      shard::require(all[from].size() >= at[from] + id.size(), shard::Code::Io, [&] { return fmt::format("rank {}: sent no id; do all run the same program?", from); });
      std::copy_n(all[from].begin() + static_cast<std::ptrdiff_t>(std::exchange(at[from], at[from] + id.size())), id.size(), id.begin());
    }
  }

  /// How ranks talk: all groups alike. Where two ranks of different groups shared a device, each group's kernels could wait there for the other's to end.
  void meet() {
    communicators_.clear();
    ids_.clear();
    transport_.clear();
    if (layout_.tensor * layout_.pipeline == 1) return;
    const auto transport = choose_transport(boards());
    transport_ = fmt::format("ranks talk {}: {}", transport.nccl ? "by NCCL " + nccl_->version() : "through the host", transport.why);
    shard::require(transport.nccl || !layout_.processes, shard::Code::Device,
                   [&] { return fmt::format("several processes talk by NCCL: {}; one process alone runs all ranks on what there is", transport.why); });
    if (!transport.nccl) return;
    std::vector<std::pair<Axis, int>> groups;
    for (const auto axis : {Axis::Pipeline, Axis::Tensor})
      for (int group = 0; group < (axis == Axis::Tensor ? layout_.pipeline : layout_.tensor); ++group)
        if (members(axis, group).size() > 1) groups.emplace_back(axis, group);
    make_ids(groups);
  }

  using End = std::tuple<Axis, int, int>;                             ///< of NCCL: axis, group, member
  /// Null before communicator() made it, or where there is none.
  Communicator* made(const End& end) {
    const std::lock_guard lock(mutex_);
    const auto known = communicators_.find(end);
    return known == communicators_.end() ? nullptr : known->second.get();
  }

  /// This rank's end of NCCL along `axis`, made when first asked for, in all ranks at once; null where it is alone or they talk through the host.
  Communicator* communicator(Axis axis, int stage, int tensor_rank, std::shared_ptr<Together> together) {
    const int group = axis == Axis::Tensor ? stage : tensor_rank, member = axis == Axis::Tensor ? tensor_rank : stage;
    if (!by_nccl(axis, group)) return nullptr;
    const End end{axis, group, member};
    if (auto* const known = made(end)) {
      known->meet_by(std::move(together));
      return known;
    }
    const int size = static_cast<int>(members(axis, group).size());
    auto fresh = std::make_unique<Communicator>(*nccl_, ids_.at({axis, group}), member, size, of(stage, tensor_rank).device(), std::move(together));  // waits for the others
    const std::lock_guard lock(mutex_);
    if (failed_) fresh->fail();
    return (communicators_[end] = std::move(fresh)).get();
  }
  void load_nccl() {
    if (nccl_ || !no_nccl_.empty()) return;
    try {
      nccl_.emplace(options_.nccl);
    } catch (const shard::Error& error) {
      no_nccl_ = error.what();
    }
  }

  LanguageDeviceOptions options_;
  std::vector<std::string> names_;
  lm::Ranks layout_;
  shard::TransformerConfig config_;                                   ///< of the last run
  std::vector<lm::StagePlan> plans_;
  std::vector<std::unique_ptr<DeviceOps>> ranks_;                     ///< none of those that other processes are
  std::deque<Resident> held_;                                         ///< by rank
  std::map<int, RankWeights> weights_;
  std::optional<Nccl> nccl_;
  std::string no_nccl_, transport_;
  std::map<End, std::unique_ptr<Communicator>> communicators_;
  std::map<std::pair<Axis, int>, Nccl::Id> ids_;                      ///< of the groups that talk by NCCL
  bool failed_ = false;
  std::mutex mutex_;
};

}  // namespace

std::unique_ptr<lm::Device> language_device(LanguageDeviceOptions options) { return std::make_unique<Devices>(std::move(options)); }

}  // namespace gpu
