// Ids against those that Hugging Face's tokenizers gave (tests/peers/make_tokenizers.py), and files that are none.
#include "formats/tokenizer.h"

#include "formats/file.h"
#include "formats/json.h"
#include "libshard/error.h"

#include <doctest/doctest.h>

#include <fstream>

namespace {

const std::filesystem::path kFolder = std::filesystem::path(SHARDKIT_TEST_DATA) / "tokenizers";

std::filesystem::path written(const std::string& text) {
  const auto path = std::filesystem::temp_directory_path() / "shardkit-tokenizer-test.json";
  std::ofstream(path) << text;
  return path;
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
                           R"({"model": {"vocab": {}, "merges": []}, "normalizer": {"type": "Precompiled"}})"}) {
    CAPTURE(text);
    CHECK_THROWS_AS(formats::Tokenizer{written(text)}, shard::Error);
  }
  const formats::Tokenizer tokenizer(kFolder / "gpt2.json");
  CHECK_THROWS_AS(tokenizer.encode("\xff\xfe"), shard::Error);
}
