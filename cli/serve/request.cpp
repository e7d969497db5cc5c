// Strict: an unknown key is an error that names it, since a misspelt one would silently judge something else.
#include "cli/serve/request.h"

#include "formats/file.h"
#include "formats/json.h"
#include "libshard/error.h"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <utility>

namespace cli {
namespace {

namespace fs = std::filesystem;

std::string clipped(const std::string& text) { return text.size() > 200 ? text.substr(0, 200) + "…" : text; }

std::string text_of(const nlohmann::json& value, const std::string& key) {
  if (!value.is_string()) throw Refusal{400, fmt::format("{}: is a JSON {}; should be a string", key, value.type_name())};
  return value.get<std::string>();
}

std::int64_t whole_of(const nlohmann::json& value, const std::string& key, std::int64_t least, std::int64_t most) {
  if (value.is_number_integer() && !(value.is_number_unsigned() && value.get<std::uint64_t>() > static_cast<std::uint64_t>(most)))
    if (const auto number = value.get<std::int64_t>(); number >= least && number <= most) return number;
  throw Refusal{400, fmt::format("{}: should be a whole number from {} to {}", key, least, most)};
}

}  // namespace

std::string confined(const fs::path& root, const std::string& key, const std::string& given) {
  if (given.empty() || given.find('\0') != given.npos) throw Refusal{400, fmt::format("{}: is no path", key)};
  std::error_code error;
  // Resolves links as far as the path exists; the rest is taken as text, so that what lies outside looks the same whether it is there or not.
  const auto path = fs::weakly_canonical(root / given, error);
  if (error) throw Refusal{404, fmt::format("{}: '{}': not found", key, clipped(given)), 3};
  if (!formats::lies_in(path, root)) throw Refusal{403, fmt::format("{}: '{}' is outside the root; should be inside", key, clipped(given))};
  if (!fs::exists(path, error)) throw Refusal{404, fmt::format("{}: '{}': not found", key, clipped(given)), 3};
  // A snapshot's files lie beside it.
  if (const auto blobs = formats::cache_blobs(path); blobs && !formats::lies_in(*blobs, root))
    throw Refusal{403, fmt::format("{}: '{}' is of a Hugging Face cache whose blobs are outside the root; should be inside", key, clipped(given))};
  return path.lexically_relative(root).string();
}

ValidateAsk read_ask(const fs::path& root, std::string_view body) {
  nlohmann::json json;
  try {
    json = formats::parse_json(body, "request");
  } catch (const shard::Error& error) {
    throw Refusal{400, error.what()};
  }
  if (!json.is_object()) throw Refusal{400, fmt::format("request: is a JSON {}; should be an object with \"checkpoint\"", json.type_name())};
  ValidateAsk ask;
  std::string unknown;
  for (const auto& [key, value] : json.items()) {
    if (key == "checkpoint") ask.path = confined(root, key, text_of(value, key));
    else if (key == "reference") ask.reference = confined(root, key, text_of(value, key));
    else if (key == "tokens") ask.tokens = confined(root, key, text_of(value, key));
    else if (key == "text") ask.text = confined(root, key, text_of(value, key));
    else if (key == "against") ask.against = confined(root, key, text_of(value, key));
    else if (key == "compute") ask.compute = text_of(value, key);
    else if (key == "tp") ask.tp = static_cast<int>(whole_of(value, key, 1, 64));
    else if (key == "pp") ask.pp = static_cast<int>(whole_of(value, key, 1, 64));
    else if (key == "iteration") ask.model.open.iteration = whole_of(value, key, 0, 1'000'000'000'000);
    else if (key == "max_loss") {
      if (!value.is_number() || !std::isfinite(value.get<double>())) throw Refusal{400, "max_loss: should be a number"};
      ask.max_loss = value.get<double>();
    } else {
      if (unknown.size() < 200) unknown += (unknown.empty() ? "" : ", ") + clipped(key);
    }
  }
  if (!unknown.empty()) throw Refusal{400, fmt::format("request: unknown key {}; known are checkpoint, reference, tokens, text, against, compute, tp, pp, iteration, max_loss", unknown)};
  if (ask.path.empty()) throw Refusal{400, "request: \"checkpoint\" is missing"};
  if (!lm::compute_named(ask.compute)) throw Refusal{400, fmt::format("compute: '{}'; f32, bf16 and fp8 are known", clipped(ask.compute))};
  if (!ask.reference.empty() + !ask.tokens.empty() + !ask.text.empty() > 1) throw Refusal{400, "request: give one of reference, tokens and text"};
  if (!ask.reference.empty() && !ask.against.empty()) throw Refusal{400, "request: against goes with tokens or text, not with reference"};
  return ask;
}

std::string in_words_of_a_request(std::string message) {
  static constexpr std::pair<std::string_view, std::string_view> kKeys[] = {{"--reference", "reference"}, {"--tokens", "tokens"}, {"--text", "text"}, {"--against", "against"}, {"--compute", "compute"},
                                                                            {"--tp", "tp"}, {"--pp", "pp"}, {"--iteration", "iteration"}, {"--max-loss", "max_loss"}};
  const auto part_of_word = [](char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '-' || c == '_' || c == '/' || c == '.'; };
  for (const auto& [flag, key] : kKeys)
    for (auto at = message.find(flag); at != message.npos; at = message.find(flag, at + 1)) {
      const auto end = at + flag.size();
      if ((at == 0 || !part_of_word(message[at - 1])) && (end == message.size() || !part_of_word(message[end]))) message.replace(at, flag.size(), key);
    }
  return message;
}

}  // namespace cli
