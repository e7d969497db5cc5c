// Planning by box subtraction: what is still missing of a target box is looked for in the source's next shard.
#include "libshard/plan.h"

#include "libshard/error.h"

#include <algorithm>
#include <map>
#include <tuple>

namespace shard {
namespace {

bool touch(const Box& a, const Box& b) {
  for (std::size_t d = 0; d < a.lo.size(); ++d)
    if (a.lo[d] >= b.lo[d] + b.size[d] || b.lo[d] >= a.lo[d] + a.size[d]) return false;
  return true;
}

std::uint64_t byte_offset(const Shard& shard, const Shape& lo) {
  Index offset = 0;
  for (std::size_t d = 0; d < lo.size(); ++d) offset += (lo[d] - shard.box.lo[d]) * shard.place.stride[d];
  return shard.place.offset + static_cast<std::uint64_t>(offset);
}

/// Loops in target order, merged where both ends continue, with the innermost contiguous one as the run.
void normalise(Copy& copy) {
  const auto item = static_cast<Index>(size_of(copy.from_type)), wide = static_cast<Index>(size_of(copy.to_type));
  auto& steps = copy.steps;
  std::erase_if(steps, [](const Step& step) { return step.count == 1; });
  std::stable_sort(steps.begin(), steps.end(), [](const Step& a, const Step& b) { return a.to > b.to; });
  std::vector<Step> merged;
  for (const auto& step : steps) {
    if (!merged.empty() && merged.back().from == step.from * step.count && merged.back().to == step.to * step.count)
      merged.back() = {merged.back().count * step.count, step.from, step.to};
    else
      merged.push_back(step);
  }
  copy.run = static_cast<std::uint64_t>(item);
  if (!merged.empty() && merged.back().from == item && merged.back().to == wide) {
    copy.run = static_cast<std::uint64_t>(merged.back().count * item);
    merged.pop_back();
  }
  steps = std::move(merged);
}

Copy copy_box(std::uint32_t tensor, const Box& box, const Shard& from, DType from_type, const Shard& to, DType to_type) {
  Copy copy{tensor, from.place.stream, to.place.stream, byte_offset(from, box.lo), byte_offset(to, box.lo), {}, 0,
            from_type, to_type};
  for (std::size_t d = 0; d < box.lo.size(); ++d)
    copy.steps.push_back({box.size[d], from.place.stride[d], to.place.stride[d]});
  normalise(copy);
  return copy;
}

Comparison comparison(std::uint32_t index, const ShardedTensor& tensor, const Shard& a, const Shard& b) {
  return {copy_box(index, a.box, a, tensor.dtype, b, tensor.dtype), a.box, a.replica_id[0] != b.replica_id[0]};
}

/// The first shard of each distinct box; the others are replicas of it.
struct Distinct {
  std::vector<const Shard*> shards;
  std::vector<std::pair<const Shard*, const Shard*>> replicas;
};

Distinct distinct(const ShardedTensor& tensor) {
  Distinct out;
  std::map<std::pair<Shape, Shape>, const Shard*> seen;
  for (const auto& shard : tensor.shards) {
    const auto [at, fresh] = seen.try_emplace({shard.box.lo, shard.box.size}, &shard);
    if (fresh) out.shards.push_back(&shard);
    else out.replicas.emplace_back(at->second, &shard);
  }
  std::sort(out.shards.begin(), out.shards.end(), [](const Shard* a, const Shard* b) { return a->box.lo < b->box.lo; });
  return out;
}

class Planner {
 public:
  Planner(const ShardedStateDict& source, const PlanOptions& options) : source_(source), options_(options) {}

  void add(const ShardedTensor& target) {
    const auto found = source_.tensors.find(target.key);
    require(found != source_.tensors.end(), Code::Mismatch,
            [&] { return fmt::format("{}: the target needs it; the source does not hold it", target.key); });
    const auto& source = found->second;
    check_pair(source, target);
    tensor_ = static_cast<std::uint32_t>(plan.tensors.size());
    plan.tensors.push_back(target.key);
    const auto shards = distinct(source);
    for (const auto& [first, other] : shards.replicas) plan.comparisons.push_back(comparison(tensor_, source, *first, *other));
    for (const auto& shard : target.shards) add_shard(source, shards.shards, target, shard);
  }

  Plan plan;

 private:
  void check_pair(const ShardedTensor& source, const ShardedTensor& target) const {
    auto wanted = target.global_shape;
    if (source.vocabulary && !wanted.empty()) wanted[0] = source.global_shape.at(0);
    require(source.global_shape == wanted, Code::Mismatch, [&] {
      return fmt::format("{}: shape {} in the source; the target needs {}", source.key, to_string(source.natural),
                         to_string(target.natural));
    });
    require(source.dtype == target.dtype || options_.cast, Code::Mismatch, [&] {
      return fmt::format("{}: {} in the source; the target needs {}", source.key, name(source.dtype), name(target.dtype));
    });
  }

  void add_shard(const ShardedTensor& source, const std::vector<const Shard*>& shards, const ShardedTensor& target,
                 const Shard& shard) {
    std::vector<Box> missing{shard.box};
    for (const auto* from : shards) {
      if (missing.empty()) break;
      if (!touch(from->box, shard.box)) continue;
      std::vector<Box> rest;
      for (const auto& box : missing) {
        const auto common = intersect(box, from->box);
        if (!common) {
          rest.push_back(box);
          continue;
        }
        plan.copies.push_back(copy_box(tensor_, *common, *from, source.dtype, shard, target.dtype));
        for (auto& piece : subtract(box, *common)) rest.push_back(std::move(piece));
      }
      missing = std::move(rest);
    }
    for (const auto& box : missing)
      if (!empty(box)) fill(source, shards, target, shard, box);
  }

  /// New padding rows; anything else that is missing is an error.
  void fill(const ShardedTensor& source, const std::vector<const Shard*>& shards, const ShardedTensor& target,
            const Shard& shard, const Box& box) {
    const auto rows = source.global_shape.empty() ? 0 : source.global_shape[0];
    require(source.vocabulary && box.lo[0] >= rows, Code::BadFormat, [&] {
      return fmt::format("{}: no shard of the source holds {} of {}", source.key, to_string(box),
                         to_string(source.global_shape));
    });
    plan.filled.push_back(target.key);
    if (options_.pad == Pad::Last && rows > 0) return fill_last(source, shards, target, shard, box, rows - 1);
    const auto item = static_cast<Index>(size_of(source.dtype));
    Shape row = source.global_shape;
    row[0] = 1;
    Shard constant{{box.lo, box.size}, {memory_row(source, row), 0, row_major(row)}, {}};
    for (auto& stride : constant.place.stride) stride *= item;
    for (std::size_t d = 0; d < row.size(); ++d)
      constant.place.offset += static_cast<std::uint64_t>(d ? box.lo[d] * constant.place.stride[d] : 0);
    constant.place.stride[0] = 0;
    plan.copies.push_back(copy_box(tensor_, box, constant, source.dtype, shard, target.dtype));
  }

  void fill_last(const ShardedTensor& source, const std::vector<const Shard*>& shards, const ShardedTensor& target,
                 const Shard& shard, const Box& box, Index last) {
    for (const auto* from : shards) {
      Box row = box;
      row.lo[0] = last;
      row.size[0] = 1;
      const auto common = intersect(row, from->box);
      if (!common) continue;
      Shard repeated = *from;
      repeated.place.offset = byte_offset(*from, common->lo);
      repeated.place.stride[0] = 0;
      Box into = *common;
      into.lo[0] = box.lo[0];
      into.size[0] = box.size[0];
      repeated.box = into;
      plan.copies.push_back(copy_box(tensor_, into, repeated, source.dtype, shard, target.dtype));
    }
  }

  std::uint32_t memory_row(const ShardedTensor& source, const Shape& row) {
    const auto [at, fresh] = memory_.try_emplace(source.key, static_cast<std::uint32_t>(plan.memory.size()));
    if (fresh && options_.pad == Pad::Mean && options_.mean_row) plan.memory.push_back(options_.mean_row(source));
    else if (fresh) plan.memory.emplace_back(static_cast<std::size_t>(volume(row)) * size_of(source.dtype));
    return kMemoryStreams + at->second;
  }

  const ShardedStateDict& source_;
  const PlanOptions& options_;
  std::uint32_t tensor_ = 0;
  std::map<std::string, std::uint32_t> memory_;
};

bool by_target(const Copy& a, const Copy& b) {
  return std::tie(a.to_stream, a.to, a.from_stream, a.from) < std::tie(b.to_stream, b.to, b.from_stream, b.from);
}

/// Joins `b` behind `a` where every turn of the loops leaves them adjacent at both ends.
bool join(Copy& a, const Copy& b) {
  const bool adjacent = a.from_type == b.from_type && a.to_type == b.to_type && a.from_type == a.to_type &&
                        a.from_stream == b.from_stream && a.to_stream == b.to_stream && a.steps == b.steps &&
                        a.from + a.run == b.from && a.to + a.run == b.to && a.from_stream < kMemoryStreams;
  if (!adjacent) return false;
  a.run += b.run;
  while (!a.steps.empty() && a.steps.back().from == static_cast<Index>(a.run) &&
         a.steps.back().to == static_cast<Index>(a.run)) {
    a.run *= static_cast<std::uint64_t>(a.steps.back().count);
    a.steps.pop_back();
  }
  return true;
}

}  // namespace

std::uint64_t Copy::bytes() const {
  auto out = run;
  for (const auto& step : steps) out *= static_cast<std::uint64_t>(step.count);
  return out;
}

Plan make_plan(const ShardedStateDict& source, const ShardedStateDict& target, const PlanOptions& options) {
  Planner planner(source, options);
  for (const auto& [key, tensor] : target.tensors) planner.add(tensor);
  coalesce(planner.plan.copies);
  std::sort(planner.plan.filled.begin(), planner.plan.filled.end());
  planner.plan.filled.erase(std::unique(planner.plan.filled.begin(), planner.plan.filled.end()), planner.plan.filled.end());
  return std::move(planner.plan);
}

Plan compare_replicas(const ShardedStateDict& source) {
  Plan plan;
  for (const auto& [key, tensor] : source.tensors) {
    const auto shards = distinct(tensor);
    if (shards.replicas.empty()) continue;
    for (const auto& [first, other] : shards.replicas)
      plan.comparisons.push_back(comparison(static_cast<std::uint32_t>(plan.tensors.size()), tensor, *first, *other));
    plan.tensors.push_back(key);
  }
  return plan;
}

void coalesce(std::vector<Copy>& copies) {
  std::erase_if(copies, [](const Copy& copy) { return copy.bytes() == 0; });
  std::sort(copies.begin(), copies.end(), by_target);
  for (bool joined = true; joined;) {  // joining heads and tails can make longer ones meet: a few rounds at most
    joined = false;
    std::vector<Copy> out;
    for (auto& copy : copies) {
      if (!out.empty() && join(out.back(), copy)) joined = true;
      else out.push_back(std::move(copy));
    }
    copies = std::move(out);
  }
}

Plan part_of(const Plan& plan, std::size_t index, std::size_t count) {
  std::map<std::uint32_t, std::uint64_t> bytes;
  for (const auto& copy : plan.copies) bytes[copy.to_stream] += copy.bytes();
  std::uint64_t all = 0, before = 0;
  for (const auto& [stream, size] : bytes) all += size;
  std::map<std::uint32_t, bool> mine;
  for (const auto& [stream, size] : bytes) {
    mine[stream] = all == 0 ? index == 0 : std::min<std::uint64_t>(count - 1, before * count / all) == index;
    before += size;
  }
  Plan out{plan.tensors, {}, {}, plan.memory, plan.filled, true};
  for (const auto& copy : plan.copies)
    if (mine[copy.to_stream]) out.copies.push_back(copy);
  for (std::size_t i = index; i < plan.comparisons.size(); i += count) out.comparisons.push_back(plan.comparisons[i]);
  return out;
}

}  // namespace shard
