// Which part of each weight a tensor rank computes with: rows of what is cut by outputs, columns of what is cut by inputs, all of the rest.
#pragma once

#include "libshard/box.h"
#include "libshard/transformer_config.h"
#include "lm/weights.h"

#include <map>
#include <string>
#include <vector>

namespace lm {

/// [lo, lo + count) of `all` things cut in `size` nearly equal runs.
struct Share {
  Index lo, count;
};
Share share_of(Index all, int rank, int size);
/// The key and value groups of `ratio` query heads each that these heads read. Where there are more ranks than groups, neighbours share one.
Share groups_of(const Share& heads, Index ratio);

/// One of the `size` ranks of a tensor group.
struct TensorRank {
  int rank = 0, size = 1;
};

/// The box of weight `name` [rows, columns] (a vector is one row) that the rank computes with; empty where it needs none of it: the bias of a sum over
/// ranks is the first one's to add. Throws Mismatch where heads or groups do not divide it.
shard::Box part_of(const shard::TransformerConfig& config, const std::string& name, Sides whole, TensorRank at);
/// The same of a weight of `source`; of scales, all whose blocks the part of their weight touches.
shard::Box part_of(const shard::TransformerConfig& config, const WeightSource& source, const std::string& name, TensorRank at);

/// What a rank holds of a weight.
struct Part {
  shard::DType type;                           ///< that products take
  shard::Box box;                              ///< of [rows, columns] of the whole
  bool operator==(const Part&) const = default;
  std::uint64_t bytes() const;
};
/// By name, without those it needs nothing of.
using Parts = std::map<std::string, Part>;
/// Whether any of the use's rows are among the parts.
bool needs(const Parts& parts, const WeightUse& use);
/// The rank of `size` that brings each use where one does for all: the next in order goes to whom the fewest bytes went to so far.
std::vector<int> readers_of(const WeightSource& source, const std::vector<WeightUse>& uses, int size);
Parts parts_of(const shard::TransformerConfig& config, const WeightSource& source, const std::vector<WeightUse>& uses, TensorRank at);

/// Weights that come whole, as one rank takes them.
class RankStream : public Weights {
 public:
  /// Keeps references to both.
  RankStream(const shard::TransformerConfig& config, WeightStream& whole, TensorRank at) : config_(config), whole_(whole), at_(at) {}
  bool has(const std::string& name) const override { return whole_.has(name); }
  Weight take(const std::string& name, Index lo = 0) override;
  Tensor gather(const std::string& name, const Ids& ids, Index lo, Index hi) override { return whole_.gather(name, ids, lo, hi); }

 private:
  const shard::TransformerConfig& config_;
  WeightStream& whole_;
  TensorRank at_;
};

}  // namespace lm
