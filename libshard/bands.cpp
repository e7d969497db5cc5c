// Finding row bands: copies of equal row count that touch the same rows of a stream belong together.
#include "libshard/bands.h"

#include <algorithm>
#include <numeric>
#include <tuple>

namespace shard {
namespace {

bool by_rows(const Copy& copy) {
  return copy.steps.size() == 1 && copy.from_type == copy.to_type && copy.from_stream < kMemoryStreams &&
         copy.steps[0].from >= static_cast<Index>(copy.run) && copy.steps[0].to >= static_cast<Index>(copy.run);
}

struct End {
  std::size_t copy;
  std::uint32_t stream;
  std::uint64_t stride, offset;
  Index rows;
};

/// Numbers the bands of one end; band[i] for the i-th end.
std::vector<std::size_t> number_bands(std::vector<End> ends, std::vector<Band>& bands, const std::vector<Copy>& copies) {
  std::sort(ends.begin(), ends.end(), [](const End& a, const End& b) {
    return std::tie(a.stream, a.stride, a.rows, a.offset) < std::tie(b.stream, b.stride, b.rows, b.offset);
  });
  std::vector<std::size_t> out(copies.size());
  const End* first = nullptr;
  for (const auto& end : ends) {
    const auto run = copies[end.copy].run;
    const bool same = first && first->stream == end.stream && first->stride == end.stride && first->rows == end.rows &&
                      end.offset <= bands.back().start + bands.back().width &&  // a hole between belongs to others
                      end.offset + run <= first->offset + first->stride;
    if (!same) {
      bands.push_back({end.stream, end.offset, end.stride, 0});
      first = &end;
    }
    bands.back().width = std::max(bands.back().width, end.offset + run - bands.back().start);
    out[end.copy] = bands.size() - 1;
  }
  return out;
}

std::size_t root(std::vector<std::size_t>& parent, std::size_t i) {
  while (parent[i] != i) i = parent[i] = parent[parent[i]];
  return i;
}

}  // namespace

std::vector<Group> group_rows(const std::vector<Copy>& copies, std::vector<std::size_t>& rest) {
  std::vector<End> from, to;
  std::vector<std::size_t> members;
  for (std::size_t i = 0; i < copies.size(); ++i) {
    if (!by_rows(copies[i])) {
      rest.push_back(i);
      continue;
    }
    const auto& copy = copies[i];
    members.push_back(i);
    from.push_back({i, copy.from_stream, static_cast<std::uint64_t>(copy.steps[0].from), copy.from, copy.steps[0].count});
    to.push_back({i, copy.to_stream, static_cast<std::uint64_t>(copy.steps[0].to), copy.to, copy.steps[0].count});
  }
  std::vector<Band> from_bands, to_bands;
  const auto from_of = number_bands(from, from_bands, copies), to_of = number_bands(to, to_bands, copies);
  std::vector<std::size_t> parent(from_bands.size() + to_bands.size());
  std::iota(parent.begin(), parent.end(), std::size_t{0});
  for (const auto i : members) parent[root(parent, from_of[i])] = root(parent, from_bands.size() + to_of[i]);
  std::vector<Group> groups;
  std::vector<std::size_t> group_of(parent.size(), SIZE_MAX), local_from(from_bands.size(), SIZE_MAX),
      local_to(to_bands.size(), SIZE_MAX);
  for (const auto i : members) {
    auto& index = group_of[root(parent, from_of[i])];
    if (index == SIZE_MAX) {
      index = groups.size();
      groups.push_back({copies[i].steps[0].count, {}, {}, {}});
    }
    auto& group = groups[index];
    const auto local = [](std::size_t& slot, std::vector<Band>& bands, const Band& band) {
      if (slot == SIZE_MAX) slot = bands.size(), bands.push_back(band);
      return slot;
    };
    const auto f = local(local_from[from_of[i]], group.from, from_bands[from_of[i]]);
    const auto t = local(local_to[to_of[i]], group.to, to_bands[to_of[i]]);
    group.strips.push_back({f, t, copies[i].from - group.from[f].start, copies[i].to - group.to[t].start, copies[i].run});
  }
  return groups;
}

}  // namespace shard
