// Pairs wait in a queue, so that a text without any split takes little more than linear time.
#include "formats/bpe.h"

#include "formats/json.h"
#include "libshard/error.h"
#include "libshard/stop.h"

#include <functional>
#include <queue>

namespace formats {
namespace {

using nlohmann::json;
using shard::Code;

constexpr std::int64_t kMostTokens = 1 << 28;
constexpr std::size_t kStopEvery = 1 << 14;  // letters or merges between two looks at the flag

std::uint64_t pair_key(std::int64_t a, std::int64_t b) { return static_cast<std::uint64_t>(a) << 32 | static_cast<std::uint64_t>(b); }

std::size_t letter_size(unsigned char first) { return first < 0x80 ? 1 : first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4; }

}  // namespace

Bpe::Bpe(const json& model) {
  const auto type = model.value("type", std::string("BPE"));
  shard::require(type == "BPE", Code::BadFormat, [&] { return fmt::format("model '{}' is not supported; BPE is", shown(type)); });
  for (const auto* affix : {"continuing_subword_prefix", "end_of_word_suffix"})
    shard::require(!model.contains(affix) || model[affix].is_null() || model[affix] == "", Code::BadFormat, [&] { return fmt::format("{} is not supported", affix); });
  for (const auto& [token, id] : model.at("vocab").items()) {
    const auto number = id.get<std::int64_t>();
    shard::require(number >= 0 && number < kMostTokens, Code::BadFormat, [&] { return fmt::format("id {} is out of range", number); });
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
      shard::require(space != text.npos, Code::BadFormat, [&] { return fmt::format("merge '{}' is no pair", shown(text)); });
      left = text.substr(0, space), right = text.substr(space + 1);
    }
    const auto a = id_of(left), b = id_of(right), both = id_of(left + right);
    shard::require(a && b && both, Code::BadFormat, [&] { return fmt::format("merge '{} {}' is of tokens that are not there", shown(left), shown(right)); });
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

const Bpe::Merge* Bpe::merge_of(std::int64_t left, std::int64_t right) const {
  const auto found = merges_.find(pair_key(left, right));
  return found == merges_.end() ? nullptr : &found->second;
}

/// The ids of a word before anything is joined.
std::vector<std::int64_t> Bpe::letters(std::string_view word, const std::atomic<bool>* stop) const {
  std::vector<std::int64_t> ids;
  bool unknown_before = false;
  std::size_t count = 0;
  for (std::size_t at = 0; at < word.size();) {
    if (++count % kStopEvery == 0) shard::refuse_stopped(stop);
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
  return ids;
}

void Bpe::encode(std::string_view word, const std::atomic<bool>* stop, std::vector<std::int64_t>& out) const {
  if (ignore_merges_)
    if (const auto whole = id_of(word)) return out.push_back(*whole);
  auto ids = letters(word, stop);
  const auto count = static_cast<std::uint32_t>(ids.size());
  // A token keeps the place of its first letter; the others' places have no merge and no links lead there.
  struct Token {
    const Merge* with_next;
    std::uint32_t before, next;
  };
  std::vector<Token> tokens(count);
  const auto entry = [&](std::uint32_t at) { return static_cast<std::uint64_t>(tokens[at].with_next->rank) << 32 | at; };
  std::vector<std::uint64_t> pairs;  // rank, then place: what is joined first is the smallest
  for (std::uint32_t at = 0; at < count; ++at) {
    tokens[at] = {at + 1 < count ? merge_of(ids[at], ids[at + 1]) : nullptr, at - 1, at + 1};
    if (tokens[at].with_next) pairs.push_back(entry(at));
  }
  std::priority_queue<std::uint64_t, std::vector<std::uint64_t>, std::greater<>> queue(std::greater<>(), std::move(pairs));
  for (std::size_t taken = 1; !queue.empty(); ++taken) {
    if (taken % kStopEvery == 0) shard::refuse_stopped(stop);
    const auto first = queue.top();
    queue.pop();
    const auto at = static_cast<std::uint32_t>(first);
    auto& token = tokens[at];
    if (!token.with_next || entry(at) != first) continue;  // one of the two was joined to another since
    ids[at] = token.with_next->id;
    tokens[token.next].with_next = nullptr;
    token.next = tokens[token.next].next;
    token.with_next = token.next < count ? merge_of(ids[at], ids[token.next]) : nullptr;
    if (token.next < count) tokens[token.next].before = at;
    if (token.with_next) queue.push(entry(at));
    if (at == 0) continue;
    auto& before = tokens[token.before];
    before.with_next = merge_of(ids[token.before], ids[at]);
    if (before.with_next) queue.push(entry(token.before));
  }
  for (std::uint32_t at = 0; at < count; at = tokens[at].next) out.push_back(ids[at]);
}

}  // namespace formats
