// One buffer a weight.
#include "gpu/model/resident.h"

#include "gpu/ops/rows.h"
#include "libshard/error.h"

#include <algorithm>

namespace gpu {

bool Resident::hold(const lm::Parts& parts, StreamView on) {
  bool same = parts.size() == held_.size();
  gpu::wait(on);
  std::erase_if(held_, [&](const auto& entry) {
    const auto found = parts.find(entry.first);
    const bool stays = found != parts.end() && found->second == entry.second.part;
    same = same && stays;
    return !stays;
  });
  for (const auto& [name, part] : parts)
    if (!held_.contains(name)) held_[name] = {DeviceBuffer(part.bytes()), part};
  return same;
}

const Resident::Held& Resident::at(const std::string& name) const {
  const auto found = held_.find(name);
  shard::require(found != held_.end(), shard::Code::Mismatch, [&] { return fmt::format("{}: is missing; the model's configuration calls for it", name); });
  return found->second;
}

View Resident::view(const std::string& name) const {
  const auto& [memory, part] = at(name);
  const auto& size = part.box.size;
  return {memory.data(), part.type, size[0], size[1], size[1]};
}

const shard::Box& Resident::box(const std::string& name) const { return at(name).part.box; }

std::uint64_t Resident::size() const {
  std::uint64_t out = 0;
  for (const auto& entry : held_) out += entry.second.memory.size();
  return out;
}

lm::Weight RankWeights::take(const std::string& name, lm::Index lo) {
  const auto rows = held_.view(name);
  const auto skipped = std::clamp<lm::Index>(lo - held_.box(name).lo[0], 0, rows.rows);
  const auto& at = held_.box(name).lo;
  return {{}, rows.at(skipped, 0), rows.type, rows.rows - skipped, rows.columns, rows.stride, at[0] + skipped, at[1]};
}

lm::Tensor RankWeights::gather(const std::string& name, const lm::Ids& ids, lm::Index lo, lm::Index hi) {
  const auto table = held_.view(name);
  const auto first = held_.box(name).lo[0];
  shard::require(first <= lo && hi <= first + table.rows, shard::Code::Mismatch, [&] { return fmt::format("{}: rows {} to {} are not this rank's", name, lo, hi); });
  auto out = ops_.make(static_cast<lm::Index>(ids.host.size()), table.columns);
  gpu::gather(ops_.stream(), view_of(out), table.row_range(lo - first, hi - lo), lo, on_device(ids));
  return out;
}

}  // namespace gpu
