// Words are short, so the best pair is looked for by walking the word.
#include "formats/bpe.h"

#include "libshard/error.h"

#include <limits>

namespace formats {
namespace {

using nlohmann::json;
using shard::Code;

constexpr std::int64_t kMostTokens = 1 << 28;

std::uint64_t pair_key(std::int64_t a, std::int64_t b) { return static_cast<std::uint64_t>(a) << 32 | static_cast<std::uint64_t>(b); }

std::size_t letter_size(unsigned char first) { return first < 0x80 ? 1 : first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4; }

}  // namespace

Bpe::Bpe(const json& model) {
  const auto type = model.value("type", std::string("BPE"));
  shard::require(type == "BPE", Code::BadFormat, [&] { return fmt::format("tokenizer: model '{}' is not supported; BPE is", type); });
  for (const auto* affix : {"continuing_subword_prefix", "end_of_word_suffix"})
    shard::require(!model.contains(affix) || model[affix].is_null() || model[affix] == "", Code::BadFormat, [&] { return fmt::format("tokenizer: {} is not supported", affix); });
  for (const auto& [token, id] : model.at("vocab").items()) {
    const auto number = id.get<std::int64_t>();
    shard::require(number >= 0 && number < kMostTokens, Code::BadFormat, [&] { return fmt::format("tokenizer: id {} is out of range", number); });
    vocab_[token] = number;
  }
  std::int64_t rank = 0;
  for (const auto& merge : model.at("merges")) {
    std::string left, right;
    if (merge.is_array()) {
      left = merge.at(0).get<std::string>(), right = merge.at(1).get<std::string>();
    } else {
      const auto text = merge.get<std::string>();
      const auto space = text.find(' ');
      shard::require(space != text.npos, Code::BadFormat, [&] { return fmt::format("tokenizer: merge '{}' is no pair", text); });
      left = text.substr(0, space), right = text.substr(space + 1);
    }
    const auto a = id_of(left), b = id_of(right), both = id_of(left + right);
    shard::require(a && b && both, Code::BadFormat, [&] { return fmt::format("tokenizer: merge '{} {}' is of tokens that are not there", left, right); });
    merges_.try_emplace(pair_key(*a, *b), Merge{rank++, *both});
  }
  if (model.contains("unk_token") && model["unk_token"].is_string()) unknown_ = id_of(model["unk_token"].get<std::string>());
  fuse_unknown_ = model.value("fuse_unk", false);
  byte_fallback_ = model.value("byte_fallback", false);
  ignore_merges_ = model.value("ignore_merges", false);
}

std::optional<std::int64_t> Bpe::id_of(std::string_view token) const {
  const auto found = vocab_.find(std::string(token));
  if (found == vocab_.end()) return std::nullopt;
  return found->second;
}

void Bpe::encode(std::string_view word, std::vector<std::int64_t>& out) const {
  if (ignore_merges_)
    if (const auto whole = id_of(word)) return out.push_back(*whole);
  std::vector<std::int64_t> ids;
  bool unknown_before = false;
  for (std::size_t at = 0; at < word.size();) {
    const auto letter = word.substr(at, letter_size(static_cast<unsigned char>(word[at])));
    at += letter.size();
    if (const auto id = id_of(letter)) {
      ids.push_back(*id);
      unknown_before = false;
      continue;
    }
    std::vector<std::int64_t> bytes;
    if (byte_fallback_)
      for (const char c : letter)
        if (const auto id = id_of(fmt::format("<0x{:02X}>", static_cast<unsigned char>(c)))) bytes.push_back(*id);
    if (!bytes.empty() && bytes.size() == letter.size()) {
      ids.insert(ids.end(), bytes.begin(), bytes.end());
      unknown_before = false;
      continue;
    }
    if (!unknown_) continue;  // as tokenizers does: a letter that nothing stands for is left out
    if (!(fuse_unknown_ && unknown_before)) ids.push_back(*unknown_);
    unknown_before = true;
  }
  for (;;) {
    std::int64_t best = std::numeric_limits<std::int64_t>::max(), joined = 0;
    std::size_t where = 0;
    for (std::size_t i = 0; i + 1 < ids.size(); ++i)
      if (const auto found = merges_.find(pair_key(ids[i], ids[i + 1])); found != merges_.end() && found->second.rank < best)
        best = found->second.rank, joined = found->second.id, where = i;
    if (best == std::numeric_limits<std::int64_t>::max()) break;
    ids[where] = joined;
    ids.erase(ids.begin() + static_cast<std::ptrdiff_t>(where) + 1);
  }
  out.insert(out.end(), ids.begin(), ids.end());
}

}  // namespace formats
