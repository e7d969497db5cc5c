// The steps of a tokenizer.json in their order: added tokens, normaliser, splits, merges, post-processor.
#include "formats/tokenizer.h"

#include "formats/bpe.h"
#include "formats/file.h"
#include "formats/json.h"
#include "formats/text_splits.h"
#include "libshard/error.h"

#include <algorithm>
#include <functional>

namespace formats {
namespace {

using nlohmann::json;
using shard::Code;

constexpr std::uint64_t kLargestFile = 256u << 20;

std::string type_of(const json& step) {
  shard::require(step.is_object() && step.contains("type") && step["type"].is_string(), Code::BadFormat, [] { return "tokenizer: a step has no type"; });
  return step["type"].get<std::string>();
}

using Step = std::function<std::string(std::string)>;

std::string replace_all(std::string text, const std::string& from, const std::string& to) {
  if (from.empty()) return text;
  for (std::size_t at = 0; (at = text.find(from, at)) != text.npos; at += to.size()) text.replace(at, from.size(), to);
  return text;
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
    out.push_back([from = step["pattern"]["String"].get<std::string>(), to = step.at("content").get<std::string>()](std::string text) { return replace_all(std::move(text), from, to); });
  } else {
    shard::fail(Code::BadFormat, "tokenizer: normalizer '{}' is not supported", type);
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
      shard::require(!token.value("single_word", false), Code::BadFormat, [] { return "tokenizer: added tokens with single_word are not supported"; });
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
      shard::fail(Code::BadFormat, "tokenizer: post-processor '{}' is not supported", type);
    }
  }

  void encode_plain(std::string text, bool first, std::vector<std::int64_t>& out) const {
    if (text.empty()) return;
    for (const auto& step : normalizers) text = step(std::move(text));
    std::vector<std::string> pieces{std::move(text)};
    for (const auto& split : splits) {
      std::vector<std::string> next;
      for (std::size_t i = 0; i < pieces.size(); ++i) split(pieces[i], first && i == 0, next);
      pieces = std::move(next);
    }
    for (const auto& piece : pieces) model->encode(piece, out);
  }

  /// The first added token in `text` from `at`; of several at one place the longest.
  const Added* next_added(std::string_view text, std::size_t at, std::size_t& where) const {
    const Added* best = nullptr;
    where = text.npos;
    for (const auto& token : added)
      if (const auto found = text.find(token.content, at); found < where) best = &token, where = found;
    return best;
  }
};

Tokenizer::Tokenizer(const std::filesystem::path& path) {
  try {
    parts_ = std::make_unique<const Parts>(parse_json(read_text(path, kLargestFile), path.string()));
  } catch (const json::exception& error) {
    shard::fail(Code::BadFormat, "{}: {}", path.string(), json_problem(error));
  } catch (const shard::Error& error) {
    throw error.within(path.string());
  }
}

Tokenizer::~Tokenizer() = default;

std::vector<std::int64_t> Tokenizer::encode(std::string_view text) const {
  shard::require(is_utf8(text), Code::BadFormat, [] { return "text: is not UTF-8"; });
  auto out = parts_->before;
  std::size_t at = 0;
  for (;;) {
    std::size_t where = 0;
    const auto* token = parts_->next_added(text, at, where);
    auto plain = text.substr(at, token ? where - at : text.npos);
    if (token && token->lstrip)
      while (!plain.empty() && std::isspace(static_cast<unsigned char>(plain.back()))) plain.remove_suffix(1);
    parts_->encode_plain(std::string(plain), at == 0, out);
    if (!token) break;
    out.push_back(token->id);
    at = where + token->content.size();
    if (token->rstrip)
      while (at < text.size() && std::isspace(static_cast<unsigned char>(text[at]))) ++at;
  }
  out.insert(out.end(), parts_->after.begin(), parts_->after.end());
  return out;
}

}  // namespace formats
