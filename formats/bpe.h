// Byte-pair encoding: the pair with the lowest rank is joined first, the leftmost of equals.
#pragma once

#include <nlohmann/json.hpp>

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace formats {

class Bpe {
 public:
  /// The `model` of a tokenizer.json. Throws BadFormat for another kind of model.
  explicit Bpe(const nlohmann::json& model);
  /// Appends the ids of one word. Throws BadFormat where a letter has no token and the model has no token for that.
  void encode(std::string_view word, std::vector<std::int64_t>& out) const;

 private:
  struct Merge {
    std::int64_t rank, id;
  };
  std::optional<std::int64_t> id_of(std::string_view token) const;

  std::unordered_map<std::string, std::int64_t> vocab_;
  std::unordered_map<std::uint64_t, Merge> merges_;  ///< by the two ids
  std::optional<std::int64_t> unknown_;
  bool fuse_unknown_ = false, byte_fallback_ = false, ignore_merges_ = false;
};

}  // namespace formats
