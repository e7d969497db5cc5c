// Host pages go through two pinned buffers, so that copying into one overlaps sending the other.
#include "gpu/model/resident.h"

#include "gpu/ops/rows.h"
#include "libshard/error.h"

#include <algorithm>
#include <cstring>

namespace gpu {
namespace {

class Uploads {
 public:
  explicit Uploads(StreamView on) : on_(on) {}
  ~Uploads() {
    try {
      gpu::wait(on_);
    } catch (...) {  // told by the next call on the stream
    }
  }
  void send(std::byte* to, const std::byte* from, std::size_t bytes) {
    for (std::size_t at = 0; at < bytes;) {
      auto& slot = slots_[next_++ % 2];
      const auto part = std::min(bytes - at, kBytes);
      slot.sent.wait();
      std::memcpy(slot.memory.data(), from + at, part);
      to_device(to + at, slot.memory.data(), part, on_);
      slot.sent.record(on_);
      at += part;
    }
  }

 private:
  static constexpr std::size_t kBytes = 16 << 20;
  struct Slot {
    PinnedBuffer memory{kBytes};
    Event sent;
  };
  StreamView on_;
  Slot slots_[2];
  std::size_t next_ = 0;
};

}  // namespace

bool Resident::load(lm::WeightStream& stream, const std::vector<lm::WeightUse>& uses, StreamView on) {
  const auto& source = stream.source();
  struct Wanted {
    shard::DType type;
    lm::Index rows, columns;
  };
  std::map<std::string, Wanted> wanted;
  for (const auto& use : uses) {
    const auto& natural = source.shape(use.name);
    const auto rows = natural.size() < 2 ? 1 : natural[0];
    wanted[use.name] = {source.type_of(use.name), rows, rows ? shard::volume(natural) / rows : 0};
  }
  bool same = wanted.size() == held_.size();
  gpu::wait(on);
  std::erase_if(held_, [&](const auto& entry) {
    const auto found = wanted.find(entry.first);
    const auto& held = entry.second;
    const bool stays = found != wanted.end() && found->second.type == held.type && found->second.rows == held.rows && found->second.columns == held.columns;
    same = same && stays;
    return !stays;
  });
  for (const auto& [name, what] : wanted)
    if (!held_.contains(name))
      held_[name] = {DeviceBuffer(static_cast<std::size_t>(what.rows * what.columns) * size_of(what.type)), what.type, what.rows, what.columns};
  Uploads uploads(on);
  for (const auto& use : uses) {
    const auto weight = stream.take(use.name, use.lo);
    const auto to = view(use.name).row_range(use.lo, weight.rows);
    shard::require(weight.stride == weight.columns && weight.columns == to.columns && use.lo + weight.rows <= held_[use.name].rows, shard::Code::Mismatch,
                   [&] { return fmt::format("{}: comes as rows of {}; {} were planned", use.name, weight.columns, to.columns); });
    uploads.send(to.data, weight.data, static_cast<std::size_t>(weight.rows * weight.columns) * size_of(weight.dtype));
  }
  gpu::wait(on);
  return same;
}

View Resident::view(const std::string& name) const {
  const auto found = held_.find(name);
  shard::require(found != held_.end(), shard::Code::Mismatch, [&] { return fmt::format("{}: is missing; the model's configuration calls for it", name); });
  const auto& held = found->second;
  return {held.memory.data(), held.type, held.rows, held.columns, held.columns};
}

lm::Weight RankWeights::take(const std::string& name, lm::Index lo) {
  const auto rows = held_.view(name);
  return {{}, rows.at(lo, 0), rows.type, rows.rows - lo, rows.columns, rows.stride};
}

lm::Tensor RankWeights::gather(const std::string& name, const lm::Ids& ids, lm::Index lo, lm::Index hi) {
  const auto table = held_.view(name);
  auto out = ops_.make(static_cast<lm::Index>(ids.host.size()), table.columns);
  gpu::gather(ops_.stream(), view_of(out), table.row_range(lo, hi - lo), lo, on_device(ids));
  return out;
}

std::uint64_t Resident::size() const {
  std::uint64_t out = 0;
  for (const auto& entry : held_) out += entry.second.memory.size();
  return out;
}

}  // namespace gpu
