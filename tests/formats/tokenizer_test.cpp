// Ids against those that Hugging Face's tokenizers gave (tests/peers/make_tokenizers.py), and files that are none.
#include "formats/tokenizer.h"

#include "formats/file.h"
#include "formats/json.h"
#include "libshard/error.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <fstream>
#include <random>

namespace {

const std::filesystem::path kFolder = std::filesystem::path(SHARDKIT_TEST_DATA) / "tokenizers";

std::filesystem::path written(const std::string& text) {
  const auto path = std::filesystem::temp_directory_path() / "shardkit-tokenizer-test.json";
  std::ofstream(path) << text;
  return path;
}

nlohmann::json small_model() { return {{"vocab", {{"a", 0}, {"b", 1}}}, {"merges", nlohmann::json::array()}}; }

/// What is said of a tokenizer, or of a text with it.
std::string refusal(const nlohmann::json& tokenizer, const std::string& text = "a b") {
  try {
    formats::Tokenizer(written(tokenizer.dump())).encode(text, "the text");
  } catch (const shard::Error& error) {
    return error.what();
  }
  return "";
}

using Ids = std::vector<std::int64_t>;

/// Byte-pair encoding by its definition: of all pairs the first in the list is joined, the leftmost of equals.
Ids by_definition(const std::string& word, const nlohmann::json& model) {
  std::vector<std::string> parts;
  for (const char c : word) parts.emplace_back(1, c);
  for (bool joined = true; joined;) {
    joined = false;
    for (const auto& merge : model["merges"]) {
      for (std::size_t i = 0; i + 1 < parts.size() && !joined; ++i)
        if (parts[i] == merge[0] && parts[i + 1] == merge[1]) {
          parts[i] += parts[i + 1];
          parts.erase(parts.begin() + static_cast<std::ptrdiff_t>(i) + 1);
          joined = true;
        }
      if (joined) break;
    }
  }
  Ids out;
  for (const auto& part : parts) out.push_back(model["vocab"][part].get<std::int64_t>());
  return out;
}

}  // namespace

TEST_CASE("ids are those of tokenizers") {
  for (const auto* name : {"gpt2", "prefixed", "llama3", "llama2", "metaspace"}) {
    const formats::Tokenizer tokenizer(kFolder / fmt::format("{}.json", name));
    for (const auto& example : formats::parse_json(formats::read_text(kFolder / fmt::format("{}.expected.json", name)), name)) {
      const auto text = example["text"].get<std::string>();
      CAPTURE(name);
      CAPTURE(text);
      CHECK(tokenizer.encode(text) == example["ids"].get<std::vector<std::int64_t>>());
    }
  }
}

TEST_CASE("what a tokenizer does not support is refused by name") {
  for (const auto* text : {"{", "[]", "{}", R"({"model": {"type": "Unigram", "vocab": []}})", R"({"model": {"vocab": {"a": 0}, "merges": ["a"]}})",
                           R"({"model": {"vocab": {"a": 0}, "merges": ["a b"]}})", R"({"model": {"vocab": {"a": -1}, "merges": []}})",
                           R"({"model": {"vocab": {}, "merges": []}, "pre_tokenizer": {"type": "BertPreTokenizer"}})",
                           R"({"model": {"vocab": {}, "merges": []}, "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated"}})",
                           R"({"model": {"vocab": {}, "merges": []}, "normalizer": {"type": "Precompiled"}})",
                           R"({"model": {"vocab": {}, "merges": []}, "pre_tokenizer": {"type": "Metaspace", "replacement": ""}})",
                           R"({"model": {"vocab": {}, "merges": []}, "pre_tokenizer": {"type": "Metaspace", "replacement": "__"}})"}) {
    CAPTURE(text);
    CHECK_THROWS_AS(formats::Tokenizer{written(text)}, shard::Error);
  }
  const formats::Tokenizer tokenizer(kFolder / "gpt2.json");
  CHECK_THROWS_AS(tokenizer.encode("\xff\xfe"), shard::Error);
}

TEST_CASE("pairs are joined in the order of the definition") {
  std::mt19937 random(20261128);
  const auto any = [&](std::size_t below) { return static_cast<std::size_t>(random() % below); };
  for (int round = 0; round < 200; ++round) {
    std::vector<std::string> tokens{"a", "b", "c"};
    nlohmann::json model{{"vocab", {{"a", 0}, {"b", 1}, {"c", 2}}}, {"merges", nlohmann::json::array()}};
    for (int m = 0; m < 12; ++m) {
      const auto left = tokens[any(tokens.size())], right = tokens[any(tokens.size())];
      const auto listed = nlohmann::json::array({left, right});
      if (std::find(model["merges"].begin(), model["merges"].end(), listed) != model["merges"].end()) continue;
      model["merges"].push_back(listed);
      if (!model["vocab"].contains(left + right)) model["vocab"][left + right] = tokens.size(), tokens.push_back(left + right);
    }
    std::shuffle(model["merges"].begin(), model["merges"].end(), random);
    const formats::Tokenizer tokenizer(written(nlohmann::json{{"model", model}}.dump()));
    std::string word;
    for (auto length = any(60); length > 0; --length) word += "abc"[any(3)];
    CAPTURE(model.dump());
    CAPTURE(word);
    CHECK(tokenizer.encode(word) == by_definition(word, model));
  }
}

TEST_CASE("a long text without splits takes no time that grows with its square") {
  const formats::Tokenizer tokenizer(kFolder / "llama2.json");
  std::string text;
  while (text.size() < 1 << 20) text += "Zeile eins, layers.0.weight <s> [2, 3]\n";
  CHECK(tokenizer.encode(text.substr(0, 1 << 20)).size() > 100'000);  // took hours when every merge walked the text
}

TEST_CASE("the flag ends tokenizing") {
  const std::atomic<bool> stop = true;
  for (const auto* name : {"gpt2", "llama2", "metaspace"}) CHECK_THROWS_WITH_AS(formats::Tokenizer(kFolder / fmt::format("{}.json", name)).encode("a text", "text", &stop), doctest::Contains("stopped"), shard::Error);
}

TEST_CASE("steps that make more and more of a text are ended") {
  nlohmann::json doubling = nlohmann::json::array();
  for (int i = 0; i < 40; ++i) doubling.push_back({{"type", "Replace"}, {"pattern", {{"String", "a"}}}, {"content", "aa"}});
  CHECK(refusal({{"model", small_model()}, {"normalizer", {{"type", "Sequence"}, {"normalizers", doubling}}}}).find("make more than 67108864 bytes") != std::string::npos);
  nlohmann::json marking = nlohmann::json::array();
  for (int i = 0; i < 40; ++i) marking.push_back({{"type", "ByteLevel"}, {"use_regex", false}});
  CHECK(refusal({{"model", small_model()}, {"pre_tokenizer", {{"type", "Sequence"}, {"pretokenizers", marking}}}}, "\xc3\xa9").find("make more than 67108864 bytes") != std::string::npos);
  std::string marks;
  for (int i = 0; i < 100'000; ++i) marks += "\xcc\x81\xcc\xa3";  // one above, one below, which belong the other way round
  CHECK(refusal({{"model", small_model()}, {"normalizer", {{"type", "NFC"}}}}, marks).find("combining marks") != std::string::npos);
  CHECK(refusal({{"model", small_model()}, {"normalizer", {{"type", "NFC"}}}}, marks.substr(0, 200)) == "");
  CHECK(refusal({{"model", small_model()}}, std::string((4u << 20) + 1, 'a')).find("more than 4194304 token ids") != std::string::npos);
}

TEST_CASE("what is wrong is said once, of the file that it is wrong in, in a short line") {
  const auto path = written("{}").string();
  const auto times = [](const std::string& text, const std::string& what) {
    std::size_t count = 0;
    for (auto at = text.find(what); at != text.npos; at = text.find(what, at + 1)) ++count;
    return count;
  };
  const auto split = [](const std::string& pattern) -> nlohmann::json { return {{"model", small_model()}, {"pre_tokenizer", {{"type", "Split"}, {"pattern", {{"Regex", pattern}}}}}}; };
  for (const auto& said : {refusal("text"), refusal({{"model", {{"type", std::string(40'000, 'x')}}}}), refusal(split(std::string(40'000, '('))), refusal(split("(a+)+$"), std::string(60, 'a') + "b"),
                           refusal({{"model", {{"vocab", {{"a", 0}}}, {"merges", nlohmann::json::array({std::string(40'000, 'x')})}}}})}) {
    CAPTURE(said);
    CHECK(times(said, path) == 1);
    CHECK(said.starts_with(path));
    CHECK(said.size() < path.size() + 200);
  }
  CHECK(refusal({{"model", small_model()}}, "\xff") == "the text: is not UTF-8");
}
