// Lookups and the cover check: do the shards of a tensor tile it exactly? By boxes, never by volumes alone.
#include "libshard/state_dict.h"

#include "libshard/error.h"

#include <algorithm>
#include <set>

namespace shard {
namespace {

/// The first dimension in which the boxes start at different places: the one worth sorting by.
std::size_t sweep_dimension(const std::vector<const Box*>& boxes) {
  const auto rank = boxes.front()->lo.size();
  for (std::size_t d = 0; d < rank; ++d)
    for (const auto* box : boxes)
      if (box->lo[d] != boxes.front()->lo[d]) return d;
  return 0;
}

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

/// The overlapping pairs, found by a sweep along one dimension; false once `most` are reported.
bool report_overlaps(const ShardedTensor& tensor, std::vector<const Box*> boxes, std::vector<Finding>& findings,
                     std::size_t most) {
  if (boxes.empty() || boxes.front()->lo.empty()) return false;
  const auto d = sweep_dimension(boxes);
  std::sort(boxes.begin(), boxes.end(), [d](const Box* a, const Box* b) { return a->lo[d] < b->lo[d]; });
  std::size_t found = 0;
  for (std::size_t i = 0; i < boxes.size(); ++i)
    for (std::size_t j = i + 1; j < boxes.size() && boxes[j]->lo[d] < boxes[i]->lo[d] + boxes[i]->size[d]; ++j)
      if (const auto common = intersect(*boxes[i], *boxes[j]); common && found < most) {
        findings.push_back({"overlap", Finding::Severity::Error, tensor.key,
                            fmt::format("shards {} and {} both hold {}; each element should be stored once",
                                        to_string(*boxes[i]), to_string(*boxes[j]), to_string(*common))});
        ++found;
      }
  return found > 0;
}

/// The boxes of [0, shape) that no shard holds; gives up after `most` since a hole can fall into many pieces.
std::vector<Box> holes(const Shape& shape, const std::vector<const Box*>& boxes, std::size_t most) {
  std::vector<Box> missing{whole(shape)};
  for (const auto* box : boxes) {
    std::vector<Box> rest;
    for (const auto& piece : missing)
      for (auto& part : subtract(piece, *box)) rest.push_back(std::move(part));
    missing = std::move(rest);
    if (missing.empty()) break;
  }
  if (missing.size() > most) missing.resize(most);
  return missing;
}

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
  const bool overlapping = report_overlaps(tensor, boxes, findings, most);
  Index held = 0;
  for (const auto* box : boxes) held += volume(box->size);
  if (!overlapping && held == volume(tensor.global_shape)) return;  // disjoint, inside and as large as the whole
  for (const auto& hole : holes(tensor.global_shape, boxes, most))
    findings.push_back({"coverage", Finding::Severity::Error, tensor.key,
                        fmt::format("no shard holds {} of {}", to_string(hole), to_string(tensor.global_shape))});
}

}  // namespace shard
