// Between stored tensors, as one dialect spells them, and logical ones: both directions of a family's table.
#pragma once

#include "libshard/family.h"

#include <set>

namespace shard {

/// Spellings (Row::key) that a source used, and for which layers and MTP depths: dense layers and mixtures of one model
/// may spell the same norm differently.
using Spellings = std::map<std::string, std::set<std::pair<Index, Index>>>;

struct Translation {
  ShardedStateDict logical;     ///< streams and files as in the stored dictionary
  Spellings rows;
  bool layers_stacked = false;
  Index layers = 0, experts = 0, depths = 0;  ///< one more than the highest number seen
};

/// Splits stored tensors into logical ones. What no row spells, or has another shape than the model's sizes give, is a
/// finding; a key of `carried` keeps its own name.
Translation to_logical(const ShardedStateDict& stored, const Table& table, const Params& params,
                       const std::set<std::string>& carried, std::vector<Finding>& findings);

/// One stored tensor of a target.
struct Wanted {
  const Row* row;
  Match match;
  std::string key;       ///< with its numbers
  Shape shape;           ///< global, without stacked layers; with stacked experts where the row says so
  DType dtype;
};

struct SpellOptions {
  const Spellings* keep = nullptr;  ///< spellings to prefer: those of the source
  Index layers = 0, experts = 0, depths = 0;
  std::vector<bool> moe_layers = {};  ///< by layer, where it is known which ones are mixtures; else a layer's router tells
};

/// The rows of `table` that together hold every logical tensor once, in registration order.
/// Throws Mismatch naming a tensor that has no place.
std::vector<Wanted> spell_out(const ShardedStateDict& logical, const Table& table, const Params& params,
                              const SpellOptions& options);

/// The logical tensors that a model of these sizes should have but `logical` does not.
std::vector<LogicalPart> missing_tensors(const ShardedStateDict& logical, const Table& table, const Params& params, const SpellOptions& sizes);

/// The names that rows have a place for whose condition this model fulfils.
std::set<std::string> placed_names(const ShardedStateDict& logical, const Table& table, const Params& params, const SpellOptions& sizes);

/// missing_tensors as findings (rule "missing").
void check_expected(const ShardedStateDict& logical, const Table& table, const Params& params, const SpellOptions& sizes,
                    std::vector<Finding>& findings);

}  // namespace shard
