// Lookups and the cover check: do the shards of a tensor tile it exactly? By boxes, never by volumes alone.
#include "libshard/state_dict.h"

#include "libshard/error.h"

#include <algorithm>
#include <set>

namespace shard {
namespace {

std::vector<const Box*> distinct_boxes(const ShardedTensor& tensor) {
  std::vector<const Box*> boxes;
  for (const auto& shard : tensor.shards)
    if (!empty(shard.box)) boxes.push_back(&shard.box);
  const auto less = [](const Box* a, const Box* b) {
    return a->lo != b->lo ? a->lo < b->lo : a->size < b->size;
  };
  std::sort(boxes.begin(), boxes.end(), less);
  boxes.erase(std::unique(boxes.begin(), boxes.end(), [](const Box* a, const Box* b) { return *a == *b; }), boxes.end());
  return boxes;
}

using Boxes = std::vector<const Box*>;

/// A plane that parts the boxes of a region, few of them on both sides.
struct Plane {
  std::size_t dim = 0;
  Index at = 0;
  std::size_t side = 0, both = 0;  ///< boxes on the fuller side, and on the two together
};

Plane best_plane(const Boxes& boxes, const Box& region) {
  Plane best{0, 0, boxes.size(), boxes.size()};
  Shape starts(boxes.size());
  for (std::size_t d = 0; d < region.lo.size(); ++d) {
    for (std::size_t i = 0; i < boxes.size(); ++i) starts[i] = boxes[i]->lo[d];
    std::nth_element(starts.begin(), starts.begin() + static_cast<std::ptrdiff_t>(starts.size() / 2), starts.end());
    const auto at = starts[starts.size() / 2];
    if (at <= region.lo[d]) continue;
    std::size_t below = 0, above = 0;
    for (const auto* box : boxes) below += box->lo[d] < at, above += box->lo[d] + box->size[d] > at;
    if (std::max(below, above) < best.side) best = {d, at, std::max(below, above), below + above};
  }
  return best;
}

bool touch(const Box& a, const Box& b) {
  for (std::size_t d = 0; d < a.lo.size(); ++d)
    if (a.lo[d] >= b.lo[d] + b.size[d] || b.lo[d] >= a.lo[d] + a.size[d]) return false;
  return true;
}

/// Compares boxes within a region, which is halved until few are left: pairs of far boxes are never looked at.
class Cover {
 public:
  Cover(const ShardedTensor& tensor, std::size_t boxes, std::vector<Finding>& findings, std::size_t most)
      : tensor_(tensor), findings_(findings), most_(most), looks_(boxes * 32), pairs_(boxes * 2048 + (1 << 26)), pieces_(boxes * 512 + 4096) {}

  void check(const Boxes& boxes, const Box& region) {
    if (overlaps_ >= most_ && holes_ >= most_) return;
    const bool many = boxes.size() > kFew && looks_ >= boxes.size();  // where halving cuts box after box, it is given up
    looks_ -= std::min(looks_, boxes.size());
    const auto plane = many ? best_plane(boxes, region) : Plane();
    if (!many || plane.side > boxes.size() / 8 * 7 || plane.both > boxes.size() / 4 * 5) {  // few, or in one another's way
      const bool overlapping = compare(boxes, region);
      if (!overlapping && held(boxes, region) == volume(region.size)) return;  // disjoint, and as large as the whole
      return find_holes(boxes, region, overlapping);
    }
    auto below = region, above = region;
    below.size[plane.dim] = plane.at - region.lo[plane.dim];
    above.lo[plane.dim] = plane.at;
    above.size[plane.dim] = region.size[plane.dim] - below.size[plane.dim];
    for (const auto& half : {below, above}) {
      Boxes within;
      for (const auto* box : boxes)
        if (touch(*box, half)) within.push_back(box);
      check(within, half);
    }
  }

 private:
  static Index held(const Boxes& boxes, const Box& region) {
    Index out = 0;
    for (const auto* box : boxes)
      if (const auto part = intersect(*box, region)) out += volume(part->size);
    return out;
  }

  /// True where two boxes overlap within the region.
  bool compare(Boxes boxes, const Box& region) {
    if (boxes.size() < 2 || region.lo.empty()) return false;
    const auto d = sweep_dimension(boxes);
    std::sort(boxes.begin(), boxes.end(), [d](const Box* a, const Box* b) { return a->lo[d] < b->lo[d]; });
    bool found = false;
    for (std::size_t i = 0; i < boxes.size(); ++i)
      for (std::size_t j = i + 1; j < boxes.size() && boxes[j]->lo[d] < boxes[i]->lo[d] + boxes[i]->size[d]; ++j) {
        if (pairs_-- == 0) return give_up(boxes.size());
        if (!touch(*boxes[i], *boxes[j])) continue;
        const auto common = intersect(*boxes[i], *boxes[j]);
        if (!common || !touch(*common, region)) continue;
        found = true;
        if (overlaps_ >= most_) return true;
        if (!contains(region, {common->lo, Shape(common->lo.size(), 1)})) continue;  // told where it begins
        findings_.push_back({"overlap", Finding::Severity::Error, tensor_.key,
                             fmt::format("shards {} and {} both hold {}; each element should be stored once", to_string(*boxes[i]), to_string(*boxes[j]), to_string(*common))});
        ++overlaps_;
      }
    return found;
  }

  /// Too many in one another's way to compare each with each: nothing more is told of the tensor.
  bool give_up(std::size_t boxes) {
    findings_.push_back({"coverage", Finding::Severity::Error, tensor_.key,
                         fmt::format("{} of its shards interlock, so that nothing parts them and no planner made them; whether they hold each element once is not found out", boxes)});
    overlaps_ = holes_ = most_;
    return true;
  }

  /// The first dimension in which the boxes start at different places: the one worth sorting by.
  static std::size_t sweep_dimension(const Boxes& boxes) {
    for (std::size_t d = 0; d < boxes.front()->lo.size(); ++d)
      for (const auto* box : boxes)
        if (box->lo[d] != boxes.front()->lo[d]) return d;
    return 0;
  }

  /// The boxes of the region that no shard holds; a hole can fall into many pieces, of which few are told.
  void find_holes(const Boxes& boxes, const Box& region, bool overlapping) {
    if (holes_ >= most_) return;
    std::vector<Box> missing{region};
    for (const auto* box : boxes) {
      if (boxes.size() > 4 * kFew || missing.size() > kMostPieces || missing.size() > pieces_) return tell_size(boxes, region, overlapping);
      pieces_ -= missing.size();
      std::vector<Box> rest;
      for (const auto& piece : missing)
        for (auto& part : subtract(piece, *box)) rest.push_back(std::move(part));
      missing = std::move(rest);
      if (missing.empty()) break;
    }
    for (const auto& hole : missing) {
      if (holes_ >= most_) break;
      findings_.push_back({"coverage", Finding::Severity::Error, tensor_.key, fmt::format("no shard holds {} of {}", to_string(hole), to_string(tensor_.global_shape))});
      ++holes_;
    }
  }

  /// More pieces than can be counted: their sum tells that there are some, where no overlap was told.
  void tell_size(const Boxes& boxes, const Box& region, bool overlapping) {
    if (overlapping) return;
    findings_.push_back({"coverage", Finding::Severity::Error, tensor_.key,
                         fmt::format("no shard holds {} elements of {} within {}", volume(region.size) - held(boxes, region), to_string(tensor_.global_shape), to_string(region))});
    ++holes_;
  }

  static constexpr std::size_t kFew = 64, kMostPieces = 4096;

  const ShardedTensor& tensor_;
  std::vector<Finding>& findings_;
  std::size_t most_, overlaps_ = 0, holes_ = 0;
  std::size_t looks_;   ///< at boxes, while regions are halved
  std::size_t pairs_;   ///< of boxes that may yet be compared
  std::size_t pieces_;  ///< of holes that boxes may yet be taken from
};

}  // namespace

const ShardedTensor& ShardedStateDict::at(std::string_view name) const {
  if (const auto tie = ties.find(name); tie != ties.end()) name = tie->second;
  const auto found = tensors.find(name);
  require(found != tensors.end(), Code::NotFound, [&] { return fmt::format("tensor '{}': not in this checkpoint", name); });
  return found->second;
}

std::string_view name(Finding::Severity severity) {
  switch (severity) {
    case Finding::Severity::Error: return "error";
    case Finding::Severity::Warning: return "warning";
    case Finding::Severity::Note: return "note";
  }
  return "error";
}

void refuse(const std::vector<Finding>& findings) {
  static const std::set<std::string, std::less<>> self_contradiction{"coverage", "overlap", "checksum"};
  for (const auto& finding : findings) {
    if (finding.severity != Finding::Severity::Error || finding.rule == "nonfinite") continue;
    throw Error(self_contradiction.contains(finding.rule) ? Code::BadFormat : Code::Mismatch,
                fmt::format("{}: {}", finding.key, finding.message));
  }
}

void check_cover(const ShardedTensor& tensor, std::vector<Finding>& findings, std::size_t most) {
  const auto boxes = distinct_boxes(tensor);
  const auto all = whole(tensor.global_shape);
  for (const auto* box : boxes)
    if (!contains(all, *box)) {
      findings.push_back({"coverage", Finding::Severity::Error, tensor.key,
                          fmt::format("shard {} reaches past the shape {}", to_string(*box), to_string(tensor.global_shape))});
      return;
    }
  if (!empty(all)) Cover(tensor, boxes.size(), findings, most).check(boxes, all);
}

}  // namespace shard
