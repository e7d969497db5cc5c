// A table of the linears that ranks share; Megatron's column- and row-parallel ones, embedding and head by vocabulary rows.
#include "lm/parts.h"

#include "libshard/error.h"

#include <algorithm>

namespace lm {
namespace {

using shard::Box;
using shard::TransformerConfig;

enum class By { Outputs, Inputs };
enum class Pieces { Heads, Groups, Lanes };

struct Rule {
  std::string_view ending;                     // of a linear's name
  By by;
  Pieces pieces;
};
constexpr Rule kRules[] = {
    {"attention.q", By::Outputs, Pieces::Heads},   {"attention.k", By::Outputs, Pieces::Groups},     {"attention.v", By::Outputs, Pieces::Groups},
    {"attention.q_up", By::Outputs, Pieces::Heads}, {"attention.kv_up", By::Outputs, Pieces::Heads}, {"attention.out", By::Inputs, Pieces::Heads},
    {".gate", By::Outputs, Pieces::Lanes},         {".up", By::Outputs, Pieces::Lanes},              {".down", By::Inputs, Pieces::Lanes},
    {"embedding.word", By::Outputs, Pieces::Lanes}, {"output", By::Outputs, Pieces::Lanes},
};

/// The rank's run of a side of `all` numbers.
Share cut(const TransformerConfig& config, const std::string& name, Pieces pieces, Index all, TensorRank at) {
  if (pieces == Pieces::Lanes) {
    shard::require(all >= at.size, shard::Code::BadLayout, [&] { return fmt::format("layout: tensor parallel size {} for {} rows of {}", at.size, all, name); });
    return share_of(all, at.rank, at.size);
  }
  const auto heads = config.num_attention_heads, count = pieces == Pieces::Heads ? heads : config.num_query_groups;
  shard::require(count > 0 && all % count == 0, shard::Code::Mismatch,
                 [&] { return fmt::format("{}: has {} numbers along the side that {} {} share", name, all, count, pieces == Pieces::Heads ? "heads" : "groups"); });
  auto mine = share_of(heads, at.rank, at.size);
  if (pieces == Pieces::Groups) mine = groups_of(mine, heads / count);
  const auto width = all / count;
  return {mine.lo * width, mine.count * width};
}

}  // namespace

Share share_of(Index all, int rank, int size) {
  const auto lo = all * rank / size;
  return {lo, all * (rank + 1) / size - lo};
}

Share groups_of(const Share& heads, Index ratio) {
  const auto first = heads.lo / ratio;
  return {first, (heads.lo + heads.count - 1) / ratio - first + 1};
}

Box part_of(const TransformerConfig& config, const std::string& name, Sides whole, TensorRank at) {
  const Box all{{0, 0}, {whole.rows, whole.columns}};
  if (at.size == 1) return all;
  const auto columns = [&](const Share& mine) { return Box{{0, mine.lo}, {whole.rows, mine.count}}; };
  if (name.ends_with("attention.sinks")) return columns(cut(config, name, Pieces::Heads, whole.columns, at));
  const bool bias = name.ends_with(".bias");
  if (!bias && !name.ends_with(".weight")) return all;
  const std::string_view linear(name.data(), name.size() - std::string_view(bias ? ".bias" : ".weight").size());
  const auto* const rule = std::find_if(std::begin(kRules), std::end(kRules), [&](const Rule& one) { return linear.ends_with(one.ending); });
  if (rule == std::end(kRules)) return all;
  if (rule->by == By::Inputs && bias) return at.rank == 0 ? all : Box{{0, 0}, {whole.rows, 0}};
  if (rule->by == By::Inputs || bias) return columns(cut(config, name, rule->pieces, whole.columns, at));
  const auto mine = cut(config, name, rule->pieces, whole.rows, at);
  return {{mine.lo, 0}, {mine.count, whole.columns}};
}

Box part_of(const TransformerConfig& config, const WeightSource& source, const std::string& name, TensorRank at) {
  const std::string weight(weight_of_scales(name));
  if (weight.empty()) return part_of(config, name, source.sides(name), at);
  auto out = part_of(config, weight, source.sides(weight), at);
  for (std::size_t axis = 0; axis < out.lo.size(); ++axis) {
    out.size[axis] = blocks_of(out.size[axis], out.lo[axis] % kScaleBlock);
    out.lo[axis] /= kScaleBlock;
  }
  return out;
}

std::uint64_t Part::bytes() const { return static_cast<std::uint64_t>(shard::volume(box.size)) * size_of(type); }

bool needs(const Parts& parts, const WeightUse& use) {
  const auto part = parts.find(use.name);
  if (part == parts.end()) return false;
  const auto lo = part->second.box.lo[0], hi = lo + part->second.box.size[0];
  return use.lo < hi && (use.count < 0 || use.lo + use.count > lo);
}

std::vector<int> readers_of(const WeightSource& source, const std::vector<WeightUse>& uses, int size) {
  std::vector<std::uint64_t> given(static_cast<std::size_t>(size));
  std::vector<int> out;
  for (const auto& use : uses) {
    if (!out.empty() && !weight_of_scales(use.name).empty()) {  // found where their weight, the use before, is read
      out.push_back(out.back());
      continue;
    }
    const auto least = std::min_element(given.begin(), given.end());
    *least += source.bytes_of(use.name, use.lo, use.count);
    out.push_back(static_cast<int>(least - given.begin()));
  }
  return out;
}

Parts parts_of(const TransformerConfig& config, const WeightSource& source, const std::vector<WeightUse>& uses, TensorRank at) {
  Parts out;
  for (const auto& use : uses)
    if (const auto box = part_of(config, source, use.name, at); !shard::empty(box)) out.try_emplace(use.name, Part{source.type_of(use.name), box});
  return out;
}

Weight RankStream::take(const std::string& name, Index lo) {
  const auto weight = whole_.take(name, lo);
  if (at_.size == 1) return weight;
  const auto mine = shard::intersect({{lo, 0}, {weight.rows, weight.columns}}, part_of(config_, whole_.source(), name, at_));
  if (!mine) return {};
  return weight.row_range(mine->lo[0] - lo, mine->size[0]).column_range(mine->lo[1], mine->size[1]);
}

}  // namespace lm
