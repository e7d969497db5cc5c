// The steps of a tokenizer.json in their order: added tokens, normaliser, splits, merges, post-processor.
#include "formats/tokenizer.h"

#include "formats/bpe.h"
#include "formats/file.h"
#include "formats/json.h"
#include "formats/text_splits.h"
#include "libshard/error.h"
#include "libshard/stop.h"

#include <algorithm>
#include <functional>

namespace formats {
namespace {

using nlohmann::json;
using shard::Code;

constexpr std::uint64_t kLargestFile = 256u << 20;
constexpr std::size_t kMostBytes = 4 * kLargestText;  // of a text on its way: steps may make more of it

std::string type_of(const json& step) {
  shard::require(step.is_object() && step.contains("type") && step["type"].is_string(), Code::BadFormat, [] { return "a step has no type"; });
  return step["type"].get<std::string>();
}

using Step = std::function<std::string(std::string)>;

void refuse_more(std::size_t bytes) {
  shard::require(bytes <= kMostBytes, Code::BadFormat, [] { return fmt::format("its steps make more than {} bytes of the text", kMostBytes); });
}

std::string replace_all(const std::string& text, const std::string& from, const std::string& to) {
  if (from.empty()) return text;
  std::string out;
  for (std::size_t at = 0;;) {
    const auto found = text.find(from, at);
    out.append(text, at, found - at);
    if (found == text.npos) return out;
    out += to;
    refuse_more(out.size());
    at = found + from.size();
  }
}

/// Normalisers in their order, each a function of the whole text.
void add_normalizers(const json& step, std::vector<Step>& out) {
  if (step.is_null()) return;
  const auto type = type_of(step);
  if (type == "Sequence") {
    for (const auto& inner : step.at("normalizers")) add_normalizers(inner, out);
  } else if (type == "NFC" || type == "NFKC" || type == "NFD" || type == "NFKD") {
    out.push_back([type](std::string text) { return normal_form(text, type); });
  } else if (type == "Prepend") {
    out.push_back([with = step.at("prepend").get<std::string>()](std::string text) { return text.empty() ? text : with + text; });
  } else if (type == "Replace" && step.at("pattern").contains("String")) {
    out.push_back([from = step["pattern"]["String"].get<std::string>(), to = step.at("content").get<std::string>()](std::string text) { return replace_all(text, from, to); });
  } else {
    shard::fail(Code::BadFormat, "normalizer '{}' is not supported", shown(type));
  }
}

struct Added {
  std::string content;
  std::int64_t id;
  bool lstrip, rstrip;
};

}  // namespace

struct Tokenizer::Parts {
  std::vector<Added> added;          ///< longest first
  std::vector<Step> normalizers;
  std::vector<Split> splits;
  std::unique_ptr<const Bpe> model;
  std::vector<std::int64_t> before, after;

  explicit Parts(const json& all) {
    for (const auto& token : all.value("added_tokens", json::array())) {
      shard::require(!token.value("single_word", false), Code::BadFormat, [] { return "added tokens with single_word are not supported"; });
      added.push_back({token.at("content").get<std::string>(), token.at("id").get<std::int64_t>(), token.value("lstrip", false), token.value("rstrip", false)});
    }
    std::erase_if(added, [](const Added& token) { return token.content.empty(); });
    std::stable_sort(added.begin(), added.end(), [](const Added& a, const Added& b) { return a.content.size() > b.content.size(); });
    add_normalizers(all.value("normalizer", json()), normalizers);
    add_splits(all.value("pre_tokenizer", json()), splits);
    model = std::make_unique<const Bpe>(all.at("model"));
    add_template(all.value("post_processor", json()));
  }

  void add_template(const json& step) {
    if (step.is_null()) return;
    const auto type = type_of(step);
    if (type == "Sequence") {
      for (const auto& inner : step.at("processors")) add_template(inner);
    } else if (type == "TemplateProcessing") {
      bool behind = false;
      for (const auto& item : step.at("single")) {
        if (item.contains("Sequence")) {
          behind = true;
          continue;
        }
        const auto& special = step.at("special_tokens").at(item.at("SpecialToken").at("id").get<std::string>());
        for (const auto& id : special.at("ids")) (behind ? after : before).push_back(id.get<std::int64_t>());
      }
    } else if (type != "ByteLevel") {
      shard::fail(Code::BadFormat, "post-processor '{}' is not supported", shown(type));
    }
  }

  void encode_plain(std::string text, bool first, const std::atomic<bool>* stop, std::vector<std::int64_t>& out) const {
    if (text.empty()) return;
    for (const auto& step : normalizers) {
      shard::refuse_stopped(stop);
      text = step(std::move(text));
      refuse_more(text.size());
    }
    std::vector<std::string> pieces{std::move(text)};
    for (const auto& split : splits) {
      std::vector<std::string> next;
      std::size_t bytes = 0;
      for (std::size_t i = 0; i < pieces.size(); ++i) {
        shard::refuse_stopped(stop);
        const auto known = next.size();
        split(pieces[i], first && i == 0, stop, next);
        for (auto k = known; k < next.size(); ++k) bytes += next[k].size();
        refuse_more(bytes);
      }
      pieces = std::move(next);
    }
    for (const auto& piece : pieces) {
      shard::refuse_stopped(stop);
      model->encode(piece, stop, out);
      refuse_more_ids(out);
    }
  }

  static void refuse_more_ids(const std::vector<std::int64_t>& ids) {
    shard::require(ids.size() <= kMostIds, Code::BadFormat, [] { return fmt::format("makes more than {} token ids of the text", kMostIds); });
  }

  std::vector<std::int64_t> encode(std::string_view text, const std::atomic<bool>* stop) const {
    auto out = before;
    std::vector<std::size_t> places(added.size(), 0);  // of each added token, from `at`; looked for again when passed
    for (std::size_t at = 0;;) {
      shard::refuse_stopped(stop);
      std::size_t where = text.npos;
      const Added* token = nullptr;            // the first; of several at one place the longest
      for (std::size_t i = 0; i < added.size(); ++i) {
        if (at == 0 || places[i] < at) places[i] = text.find(added[i].content, at);
        if (places[i] < where) token = &added[i], where = places[i];
      }
      auto plain = text.substr(at, token ? where - at : text.npos);
      if (token && token->lstrip)
        while (!plain.empty() && std::isspace(static_cast<unsigned char>(plain.back()))) plain.remove_suffix(1);
      encode_plain(std::string(plain), at == 0, stop, out);
      if (!token) break;
      out.push_back(token->id);
      refuse_more_ids(out);
      at = where + token->content.size();
      if (token->rstrip)
        while (at < text.size() && std::isspace(static_cast<unsigned char>(text[at]))) ++at;
    }
    out.insert(out.end(), after.begin(), after.end());
    return out;
  }
};

Tokenizer::Tokenizer(const std::filesystem::path& path) : path_(path.string()) {
  const auto all = parse_json(read_text(path, kLargestFile), path_);
  try {
    parts_ = std::make_unique<const Parts>(all);
  } catch (const json::exception& error) {
    shard::fail(Code::BadFormat, "{}: {}", path_, json_problem(error));
  } catch (const shard::Error& error) {
    throw error.within(path_);
  }
}

Tokenizer::~Tokenizer() = default;

std::vector<std::int64_t> Tokenizer::encode(std::string_view text, std::string_view where, const std::atomic<bool>* stop) const {
  shard::require(is_utf8(text), Code::BadFormat, [&] { return fmt::format("{}: is not UTF-8", where); });
  try {
    return parts_->encode(text, stop);
  } catch (const shard::Error& error) {
    if (error.code == Code::Io) throw;  // the flag, which is not this file's fault
    throw error.within(path_);
  }
}

}  // namespace formats
