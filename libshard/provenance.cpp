// A plan speaks of bytes; which shard they belong to is found by their place in the stream.
#include "libshard/provenance.h"

#include <algorithm>
#include <numeric>
#include <tuple>

namespace shard {
namespace {

struct Placed {
  std::uint32_t stream;
  std::uint64_t offset;
  const ShardedTensor* tensor;
  const Shard* shard;
};

/// Shards by where they start.
class Places {
 public:
  explicit Places(const ShardedStateDict& dict) {
    for (const auto& [key, tensor] : dict.tensors)
      for (const auto& shard : tensor.shards)
        if (!empty(shard.box)) all_.push_back({shard.place.stream, shard.place.offset, &tensor, &shard});
    std::stable_sort(all_.begin(), all_.end(), [](const Placed& a, const Placed& b) { return std::tie(a.stream, a.offset) < std::tie(b.stream, b.offset); });
  }
  /// The shard that holds a byte; nullptr where none does.
  const Placed* at(std::uint32_t stream, std::uint64_t offset) const {
    const auto behind = std::upper_bound(all_.begin(), all_.end(), std::pair(stream, offset),
                                         [](const auto& wanted, const Placed& one) { return wanted < std::pair(one.stream, one.offset); });
    if (behind == all_.begin()) return nullptr;
    // Of shards that start together (aliases) the first speaks for all.
    auto first = std::prev(behind);
    while (first != all_.begin() && std::prev(first)->stream == first->stream && std::prev(first)->offset == first->offset) --first;
    return first->stream == stream ? &*first : nullptr;
  }
  /// How many of `bytes` from there on lie before the next shard's start.
  std::uint64_t until_next(std::uint32_t stream, std::uint64_t offset, std::uint64_t bytes) const {
    const auto next = std::upper_bound(all_.begin(), all_.end(), std::pair(stream, offset),
                                       [](const auto& wanted, const Placed& one) { return wanted < std::pair(one.stream, one.offset); });
    return next == all_.end() || next->stream != stream ? bytes : std::min(bytes, next->offset - offset);
  }

 private:
  std::vector<Placed> all_;
};

/// The local index of a byte within a shard, by its strides.
Shape index_of(const Shard& shard, std::uint64_t byte) {
  auto rest = static_cast<Index>(byte - shard.place.offset);
  std::vector<std::size_t> dims(shard.box.size.size());
  std::iota(dims.begin(), dims.end(), std::size_t{0});
  std::stable_sort(dims.begin(), dims.end(), [&](std::size_t a, std::size_t b) { return shard.place.stride[a] > shard.place.stride[b]; });
  Shape out(dims.size(), 0);
  for (const auto d : dims) {
    if (shard.place.stride[d] <= 0 || shard.box.size[d] <= 1) continue;
    out[d] = std::min(rest / shard.place.stride[d], shard.box.size[d] - 1);
    rest -= out[d] * shard.place.stride[d];
  }
  return out;
}

/// From the first byte's index to the last one's; a run that goes on in the next row takes rows whole.
Box taken(const Shard& shard, const Copy& copy) {
  std::uint64_t last = 0;
  for (const auto& step : copy.steps) last += static_cast<std::uint64_t>((step.count - 1) * step.from);
  const auto item = size_of(copy.from_type);
  auto lo = index_of(shard, copy.from), run_end = index_of(shard, copy.from + copy.run - item), hi = index_of(shard, copy.from + copy.run - item + last);
  bool whole_from_here = false;
  for (std::size_t d = 0; d < lo.size(); ++d) {
    if (whole_from_here) {
      lo[d] = 0;
      hi[d] = shard.box.size[d] - 1;
    }
    whole_from_here = whole_from_here || run_end[d] != lo[d];
  }
  Box out{lo, hi};
  for (std::size_t d = 0; d < lo.size(); ++d) {
    out.lo[d] = shard.box.lo[d] + std::min(lo[d], hi[d]);
    out.size[d] = shard.box.lo[d] + std::max(lo[d], hi[d]) + 1 - out.lo[d];
  }
  return out;
}

Box around(const Box& a, const Box& b) {
  Box out = a;
  for (std::size_t d = 0; d < a.lo.size(); ++d) {
    out.lo[d] = std::min(a.lo[d], b.lo[d]);
    out.size[d] = std::max(a.lo[d] + a.size[d], b.lo[d] + b.size[d]) - out.lo[d];
  }
  return out;
}

/// Loops in target order whose source strides do not descend.
bool transposes(const Copy& copy) {
  for (std::size_t i = 1; i < copy.steps.size(); ++i)
    if (copy.steps[i - 1].from < copy.steps[i].from) return true;
  return !copy.steps.empty() && copy.run == size_of(copy.from_type) && copy.steps.back().from != static_cast<Index>(copy.run) &&
         copy.steps.back().to == static_cast<Index>(size_of(copy.to_type));
}

/// Without its numbers: layers and experts of one name are stacked, not fused.
std::string kind_of(const std::string& key) {
  std::string out;
  for (const char c : key)
    if (c < '0' || c > '9') out += c;
  return out;
}

class Collector {
 public:
  explicit Collector(const ShardedTensor& target) { out_.target = &target; }

  void pad() { out_.transforms.insert("padded"); }
  void make() { out_.transforms.insert("made"); }
  void add(const Placed& from, const Copy& copy) {
    const auto box = taken(*from.shard, copy);
    const auto [at, fresh] = seen_.try_emplace(from.shard, out_.origins.size());
    if (fresh) {
      out_.origins.push_back({from.tensor, from.shard, box});
      bytes_.push_back(0);
    } else {
      out_.origins[at->second].box = around(out_.origins[at->second].box, box);
    }
    bytes_[at->second] += copy.bytes();
    if (copy.from_type != copy.to_type || copy.from_type != from.tensor->dtype) out_.transforms.insert("cast");
    if (transposes(copy)) out_.transforms.insert("transposed");
    if (std::any_of(copy.steps.begin(), copy.steps.end(), [](const Step& step) { return step.from == 0; })) pad();
    const auto kind = kind_of(from.tensor->key);
    if (kind != last_) ++turns_;
    last_ = kind;
    kinds_.insert(kind);
  }

  Provenance finish() {
    auto& transforms = out_.transforms;
    for (std::size_t i = 0; i < out_.origins.size(); ++i) {
      const auto& origin = out_.origins[i];
      if (!(origin.box == origin.shard->box)) transforms.insert("cut");
      if (bytes_[i] < static_cast<std::uint64_t>(volume(origin.box.size)) * size_of(origin.tensor->dtype)) transforms.insert("split");
    }
    if (kinds_.size() > 1) transforms.insert(turns_ > kinds_.size() * std::max<std::size_t>(1, out_.target->shards.size()) ? "interleaved" : "fused");
    else if (out_.origins.size() > 1) transforms.insert("concatenated");
    if (transforms.empty()) transforms.insert("copied");
    return std::move(out_);
  }

 private:
  Provenance out_;
  std::map<const Shard*, std::size_t> seen_;
  std::vector<std::uint64_t> bytes_;  ///< taken of every origin
  std::set<std::string> kinds_;
  std::string last_;
  std::size_t turns_ = 0;
};

}  // namespace

void trace(const Plan& plan, const ShardedStateDict& source, const ShardedStateDict& target, const std::function<void(const Provenance&)>& visit) {
  const Places from(source), to(target);
  struct Piece {
    std::size_t copy;
    std::uint64_t at, bytes;  ///< of its run
  };
  std::map<std::string_view, std::vector<Piece>> pieces;
  for (std::size_t i = 0; i < plan.copies.size(); ++i) {  // a copy may run on through several tensors at both ends
    const auto& copy = plan.copies[i];
    const auto item = size_of(copy.from_type), wide = size_of(copy.to_type);
    for (std::uint64_t at = 0, bytes = 0; at < copy.run; at += bytes) {
      const auto into = copy.to + at / item * wide;
      bytes = to.until_next(copy.to_stream, into, (copy.run - at) / item * wide) / wide * item;
      if (copy.from_stream < kMemoryStreams) bytes = from.until_next(copy.from_stream, copy.from + at, bytes);
      bytes = std::max<std::uint64_t>(bytes, item);
      if (const auto* place = to.at(copy.to_stream, into)) pieces[place->tensor->key].push_back({i, at, bytes});
    }
  }
  for (const auto& [key, tensor] : target.tensors) {
    Collector collector(tensor);
    for (const auto& piece : pieces[key]) {  // none where the tensor has no elements
      auto copy = plan.copies[piece.copy];
      copy.from += piece.at;
      copy.run = piece.bytes;
      if (copy.from_stream >= kMemoryStreams) collector.pad();
      else if (const auto* place = from.at(copy.from_stream, copy.from)) collector.add(*place, copy);
      else collector.make();
    }
    visit(collector.finish());
  }
}

}  // namespace shard
