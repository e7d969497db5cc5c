// Byte-pair encoding: the pair with the lowest rank is joined first, the leftmost of equals. A word may be a whole text.
#pragma once

#include <nlohmann/json.hpp>

#include <atomic>
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
  /// Appends the ids of one word. Throws Io once `stop` is set.
  void encode(std::string_view word, const std::atomic<bool>* stop, std::vector<std::int64_t>& out) const;

 private:
  struct Merge {
    std::int64_t rank, id;
  };
  std::optional<std::int64_t> id_of(std::string_view token) const;
  std::vector<std::int64_t> letters(std::string_view word, const std::atomic<bool>* stop) const;
  const Merge* merge_of(std::int64_t left, std::int64_t right) const;

  std::unordered_map<std::string, std::int64_t> vocab_;
  std::unordered_map<std::uint64_t, Merge> merges_;  ///< by the two ids
  std::optional<std::int64_t> unknown_;
  bool fuse_unknown_ = false, byte_fallback_ = false, ignore_merges_ = false;
};

}  // namespace formats
