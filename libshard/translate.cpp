// Joining keys with rows. A layer that has a router is a mixture of experts; every other switch is the model's.
#include "libshard/translate.h"

#include "libshard/error.h"

#include <algorithm>

namespace shard {
namespace {

/// A stored shard at one index of its stacked dimensions.
Shard unstack(const Shard& shard, std::size_t stacked, const std::vector<Index>& at) {
  Shard out{{{shard.box.lo.begin() + stacked, shard.box.lo.end()}, {shard.box.size.begin() + stacked, shard.box.size.end()}},
            {shard.place.stream, shard.place.offset, {shard.place.stride.begin() + stacked, shard.place.stride.end()}},
            shard.replica_id};
  for (std::size_t d = 0; d < stacked; ++d)
    out.place.offset += static_cast<std::uint64_t>((at[d] - shard.box.lo[d]) * shard.place.stride[d]);
  return out;
}

class Splitter {
 public:
  Splitter(Translation& out, const Params& params, std::vector<Finding>& findings)
      : out_(out), params_(params), findings_(findings) {}

  void split(const ShardedTensor& stored, const Match& match) {
    const auto stacked = static_cast<std::size_t>(match.layers_stacked) + static_cast<std::size_t>(match.experts_stacked);
    if (stored.global_shape.size() < stacked) return wrong_shape(stored, "more dimensions");
    const Shape rest(stored.global_shape.begin() + static_cast<std::ptrdiff_t>(stacked), stored.global_shape.end());
    auto params = params_;
    if (match.row->vocabulary && !rest.empty()) params["vocab"] = rest[0];
    // Nothing of it would be placed, and a copy elsewhere would stand for it unseen.
    if (match.row->vocabulary && !rest.empty() && rest[0] == 0) return wrong_shape(stored, "a row for every token");
    const auto sizes = factors(*match.row, params);
    if (const auto should = sizes.stored(); should != rest) {
      const bool transposed = should.size() == rest.size() && std::equal(should.begin(), should.end(), rest.rbegin());
      return wrong_shape(stored, to_string(should) + (transposed ? ": it lies transposed" : ""));
    }
    note_sizes(stored, match);
    std::map<std::vector<Index>, std::vector<std::pair<LogicalPart, ShardedTensor*>>> parts;
    for (const auto& shard : stored.shards) {
      if (empty(shard.box)) continue;
      std::vector<Index> at(shard.box.lo.begin(), shard.box.lo.begin() + static_cast<std::ptrdiff_t>(stacked));
      do {
        auto& here = parts[at];
        if (here.empty()) here = open_parts(stored, match, sizes, params, at);
        const auto single = unstack(shard, stacked, at);
        for (auto& [part, tensor] : here) add_logical(part, sizes, single, *tensor);
      } while (next(at, shard.box));
    }
  }

 private:
  void wrong_shape(const ShardedTensor& stored, const std::string& should) {
    findings_.push_back({"shape", Finding::Severity::Error, stored.key,
                         fmt::format("shape is {}; the model's sizes give {}", to_string(stored.global_shape), should)});
  }

  void note_sizes(const ShardedTensor& stored, const Match& match) {
    const auto stacked_layers = match.layers_stacked ? stored.global_shape[0] : 0;
    const auto stacked_experts = match.experts_stacked ? stored.global_shape[match.layers_stacked ? 1 : 0] : 0;
    out_.layers_stacked |= match.layers_stacked;
    if (match.row->stage != Stage::Mtp) out_.layers = std::max({out_.layers, match.layer + 1, stacked_layers});
    out_.experts = std::max({out_.experts, match.expert + 1, stacked_experts});
    out_.depths = std::max(out_.depths, match.depth + 1);
  }

  std::vector<std::pair<LogicalPart, ShardedTensor*>> open_parts(const ShardedTensor& stored, Match match,
                                                                 const Factors& sizes, const Params& params,
                                                                 const std::vector<Index>& at) {
    std::size_t next = 0;
    if (match.layers_stacked) match.layer = at[next++];
    if (match.experts_stacked) match.expert = at[next++];
    out_.rows[match.row->key].emplace(match.layer, match.depth);
    std::vector<std::pair<LogicalPart, ShardedTensor*>> out;
    for (auto& part : logical_parts(*match.row, sizes, match, params)) {
      auto& tensor = out_.logical.tensors[part.name];
      if (tensor.key.empty()) {
        tensor = {part.name, stored.dtype, part.shape, part.natural, {}, match.row->vocabulary};
      } else if (tensor.dtype != stored.dtype || tensor.global_shape != part.shape) {
        findings_.push_back({"shape", Finding::Severity::Error, stored.key,
                             fmt::format("holds '{}' as {} {}; another tensor holds it as {} {}", part.name, name(stored.dtype),
                                         to_string(part.natural), name(tensor.dtype), to_string(tensor.natural))});
        continue;
      }
      out.emplace_back(std::move(part), &tensor);
    }
    return out;
  }

  static bool next(std::vector<Index>& at, const Box& box) {
    for (auto d = at.size(); d-- > 0;) {
      if (++at[d] < box.lo[d] + box.size[d]) return true;
      at[d] = box.lo[d];
    }
    return false;
  }

  Translation& out_;
  const Params& params_;
  std::vector<Finding>& findings_;
};

/// Params with "moe" as this layer has it: its router tells, or what is known of the layers.
Params for_layer(const ShardedStateDict& logical, Params params, const Row& row, Index layer, Index depth, const std::vector<bool>& moe_layers = {}) {
  const auto router = row.stage == Stage::Mtp ? fmt::format("mtp.{}.layer.mlp.router.weight", depth)
                                              : fmt::format("layers.{}.mlp.router.weight", layer);
  const bool known = layer >= 0 && layer < static_cast<Index>(moe_layers.size());
  params["moe"] = known ? moe_layers[static_cast<std::size_t>(layer)] : logical.tensors.contains(router);
  return params;
}

/// The logical names that one instance of a row holds.
std::vector<std::string> names_of(const Match& match, Index experts) {
  std::vector<std::string> out;
  for (Index e = 0; e < (match.experts_stacked ? experts : 1); ++e)
    for (const auto& part : match.row->parts) out.push_back(spell(part.name, match.layer, match.experts_stacked ? e : match.expert, match.depth));
  return out;
}

/// Calls visit(row index, match) for every instance of every row that a model of these sizes can have.
template <typename Visit>
void for_each_instance(const Table& table, const SpellOptions& sizes, Visit&& visit) {
  const auto& rows = table.rows();
  for (std::size_t r = 0; r < rows.size(); ++r) {
    const auto has = [&](const char* number) { return rows[r].key.find(number) != std::string::npos; };
    const bool behind = has("{m}"), stacked = rows[r].stacked;
    const Index layers = has("{l}") ? sizes.layers : 1, depths = has("{k}") || behind ? sizes.depths : 1;
    const Index experts = has("{e}") && !stacked ? sizes.experts : stacked ? std::min<Index>(sizes.experts, 1) : 1;
    for (Index l = 0; l < layers; ++l)
      for (Index k = 0; k < depths; ++k)
        for (Index e = 0; e < experts; ++e)
          if (!visit(r, Match{&rows[r], has("{l}") ? l : behind ? sizes.layers + k : -1, has("{e}") && !stacked ? e : -1,
                              has("{k}") || behind ? k : -1, false, stacked}))
            break;
  }
}

}  // namespace

Translation to_logical(const ShardedStateDict& stored, const Table& table, const Params& params,
                       const std::set<std::string>& carried, std::vector<Finding>& findings) {
  Translation out;
  out.logical.files = stored.files;
  out.logical.streams = stored.streams;
  out.logical.ties = stored.ties;
  Splitter splitter(out, params, findings);
  for (const auto& [key, tensor] : stored.tensors) {
    if (carried.contains(key)) continue;
    if (const auto match = table.match(key, params)) {
      splitter.split(tensor, *match);
    } else {
      findings.push_back({"unexpected", Finding::Severity::Error, key, "no rule of this model family places this tensor"});
    }
  }
  return out;
}

std::vector<Wanted> spell_out(const ShardedStateDict& logical, const Table& table, const Params& params,
                              const SpellOptions& options) {
  struct Choice {
    std::size_t row;
    Wanted wanted;
  };
  std::vector<Choice> chosen;
  std::set<std::string, std::less<>> claimed;
  const auto kept = [&](const Match& match) {
    const auto found = options.keep->find(match.row->key);
    return found != options.keep->end() && found->second.contains({match.layer, match.depth});
  };
  for (int pass = options.keep ? 0 : 1; pass < 3; ++pass)
    for_each_instance(table, options, [&](std::size_t r, const Match& match) {
      const auto& row = *match.row;
      if ((pass == 0 && !kept(match)) || !fits_model(row, params)) return false;
      std::vector<const ShardedTensor*> parts;
      if (row.copy && pass != 1) return true;
      for (const auto& name : names_of(match, options.experts)) {
        const auto found = logical.tensors.find(name);
        if (found == logical.tensors.end() || (!row.copy && claimed.contains(name))) return true;
        parts.push_back(&found->second);
      }
      if (pass == 1 && !holds(row.when, for_layer(logical, params, row, match.layer, match.depth))) return true;
      for (const auto* part : parts) {
        if (!row.copy) claimed.insert(part->key);
        require(part->dtype == parts.front()->dtype, Code::Mismatch, [&] {
          return fmt::format("{} is {}, {} is {}; one stored tensor holds both", part->key, name(part->dtype),
                             parts.front()->key, name(parts.front()->dtype));
        });
      }
      auto shape = factors(row, params).stored();
      if (row.stacked) shape.insert(shape.begin(), options.experts);
      chosen.push_back({r, {&row, match, spell(row.stacked ? without(row.key, "{e}") : row.key, match.layer, match.expert, match.depth),
                            std::move(shape), parts.front()->dtype}});
      return true;
    });
  for (const auto& entry : logical.tensors)
    require(claimed.contains(entry.first), Code::Mismatch,
            [&] { return fmt::format("{}: has no place in the target; --drop drops it", entry.first); });
  std::stable_sort(chosen.begin(), chosen.end(), [](const Choice& a, const Choice& b) {
    const auto order = [](const Choice& c) {
      return std::tuple(c.wanted.row->stage, c.wanted.match.layer, c.wanted.match.depth);
    };
    return order(a) != order(b) ? order(a) < order(b) : a.row < b.row;
  });
  std::vector<Wanted> out;
  for (auto& choice : chosen) out.push_back(std::move(choice.wanted));
  return out;
}

namespace {

/// What a row holds; names alone where a size is not known, such as the vocabulary of a checkpoint without embedding.
std::vector<LogicalPart> parts_or_names(const Match& match, const Params& params) {
  try {
    return logical_parts(*match.row, factors(*match.row, params), match, params);
  } catch (const Error&) {
    std::vector<LogicalPart> out;
    for (const auto& part : match.row->parts) out.push_back({spell(part.name, match.layer, match.expert, match.depth), {}, {}, {}, {}, -1, {}});
    return out;
  }
}

}  // namespace

std::vector<LogicalPart> missing_tensors(const ShardedStateDict& logical, const Table& table, const Params& params, const SpellOptions& sizes) {
  std::vector<LogicalPart> out;
  std::set<std::string> reported;
  bool wanted = false;
  for_each_instance(table, sizes, [&](std::size_t, const Match& match) {
    const auto& row = *match.row;
    // Which expert it is makes no difference: of the first one's answer the others live.
    if (match.expert <= 0) wanted = !row.optional && holds(row.when, for_layer(logical, params, row, match.layer, match.depth, sizes.moe_layers));
    if (!wanted) return false;
    const auto names = names_of(match, sizes.experts);
    const bool whole = std::all_of(names.begin(), names.end(), [&](const auto& name) { return logical.tensors.contains(name) || reported.contains(name); });
    if (whole) return true;
    auto one = match;
    for (Index e = 0; e < (match.experts_stacked ? sizes.experts : 1); ++e) {
      if (match.experts_stacked) one.expert = e;
      for (auto& part : parts_or_names(one, params))
        if (!logical.tensors.contains(part.name) && reported.insert(part.name).second) out.push_back(std::move(part));
    }
    return true;
  });
  return out;
}

std::set<std::string> placed_names(const ShardedStateDict& logical, const Table& table, const Params& params, const SpellOptions& sizes) {
  std::set<std::string> out;
  bool placed = false;
  for_each_instance(table, sizes, [&](std::size_t, const Match& match) {
    if (match.expert <= 0) placed = holds(match.row->when, for_layer(logical, params, *match.row, match.layer, match.depth, sizes.moe_layers));
    if (!placed) return false;
    for (auto& name : names_of(match, sizes.experts)) out.insert(std::move(name));
    return true;
  });
  return out;
}

void check_expected(const ShardedStateDict& logical, const Table& table, const Params& params, const SpellOptions& sizes,
                    std::vector<Finding>& findings) {
  for (const auto& part : missing_tensors(logical, table, params, sizes))
    findings.push_back({"missing", Finding::Severity::Error, part.name, "the model's settings call for it; the checkpoint does not hold it"});
}

}  // namespace shard
