// A dialect's table: how each stored tensor is spelled, which logical tensors it holds, and how it is cut among ranks.
// Data only; a new model is rows, not code.
#pragma once

#include "libshard/box.h"
#include "libshard/state_dict.h"

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace shard {

/// Sizes and switches of one model by name ("hidden", "heads", "gated" …); a switch is 0 or 1.
using Params = std::map<std::string, Index, std::less<>>;

/// "groups*(ratio+2)": integers, names, + - * / and parentheses. Throws Mismatch naming a parameter that is unknown.
Index evaluate(std::string_view expression, const Params& params);
/// "gated !mla": every word must hold; an unknown word counts as 0.
bool holds(std::string_view condition, const Params& params);

/// One logical tensor inside a stored one.
struct Part {
  std::string name;        ///< "{l}" layer, "{e}" expert, "{k}" MTP depth, "{m}" layers + depth
  int factor = -1;         ///< the factor that it takes only a range of; -1: all of every factor
  std::string lo, size;    ///< that range
  std::vector<int> order;  ///< factors in the order of the logical dimensions (a dropped one has size 1); {}: as stored
  std::string refine = {};  ///< factors that the range is split into; they take its place in `order`
};

enum class Stage { Embedding, Layer, FinalNorm, Mtp, Output };  // in the order in which Megatron registers them
enum class Ways { None, Tensor, ExpertTensor };

/// One stored tensor as one or more dialects spell it.
struct Row {
  std::string dialects;     ///< letters of the dialects that spell it so
  std::string key;
  std::string dims;         ///< factors of each stored dimension, which '|' separates: "groups ratio+2 head | hidden"
  std::vector<Part> parts;
  int cut = -1;             ///< the stored dimension cut among ranks
  Ways ways = Ways::None;
  int pieces = 1;           ///< fused pieces along it, each cut by itself
  Stage stage = Stage::Layer;
  std::string when;         ///< the model has it where this holds
  bool vocabulary = false;  ///< dimension 0 is the padded vocabulary
  bool optional = false;    ///< its absence is no finding
  bool copy = false;        ///< one more copy of tensors that another row owns
  bool stacked = false;     ///< written with all experts in one tensor ("{e}." is not spelled)
};

/// A stored key, matched: which row, for which layer, expert and MTP depth; stacked ones carry leading index dimensions.
struct Match {
  const Row* row = nullptr;
  Index layer = -1, expert = -1, depth = -1;
  bool layers_stacked = false, experts_stacked = false;
};

/// Whether a row's shape is that of this model; whether a layer is dense or has experts does not matter here.
bool fits_model(const Row& row, const Params& params);

/// Rows indexed by spelling. Stacked spellings (without the numbers) match as well.
class Table {
 public:
  /// The rows that any of the `dialects` letters spells.
  Table(std::vector<Row> rows, std::string_view dialects);
  const std::vector<Row>& rows() const { return rows_; }
  std::optional<Match> match(std::string_view key, const Params& params) const;

 private:
  struct Spelled {
    std::size_t row;
    bool layers_stacked, experts_stacked;
    std::string when;  ///< the part of the row's condition that decides between equal spellings
  };
  std::optional<Match> fill(const Spelled& spelled, const std::vector<Index>& numbers, const Params& params) const;

  std::vector<Row> rows_;
  bool mtp_behind_layers_ = false;  ///< some row spells "{m}": layer numbers from `layers` on are MTP depths
  std::multimap<std::string, Spelled, std::less<>> spelled_;
};

/// "layers.{l}.x" with the numbers filled in; "{m}" is `layer` too.
std::string spell(std::string_view pattern, Index layer, Index expert, Index depth);

/// The pattern without its "{x}." component; the same where it has none.
std::string without(std::string pattern, std::string_view number);

/// A row's factors for one model: sizes, and the stored dimension that each belongs to.
struct Factors {
  Shape sizes;
  std::vector<int> dim;
  Shape stored() const;  ///< the stored shape
};
Factors factors(const Row& row, const Params& params);

/// The logical tensors of a stored one: names, shapes, and where in the factored box each lies.
struct LogicalPart {
  std::string name;
  Box box;                 ///< in factors
  std::vector<int> order;  ///< factors, after refining, in the order of the logical dimensions
  Shape shape, natural;
  int refined = -1;        ///< the factor whose range is split into `into`
  Shape into;
};
std::vector<LogicalPart> logical_parts(const Row& row, const Factors& factors, const Match& match, const Params& params);

/// Adds the logical shards of one stored shard (`box` in stored dimensions, without stacked ones) to `into`.
void add_logical(const LogicalPart& part, const Factors& factors, const Shard& stored, ShardedTensor& into);

}  // namespace shard
