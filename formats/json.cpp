// nlohmann's parser, which does not recurse, with a callback that watches depth and keys.
#include "formats/json.h"

#include <set>
#include <string>
#include <vector>

#include "libshard/error.h"

namespace formats {

using shard::Code;

namespace {

std::string printable(std::string_view text) {
  std::string out;
  for (const char c : text) out += c >= ' ' && c <= '~' ? c : '?';
  return out;
}

}  // namespace

std::string json_problem(const nlohmann::json::exception& error) {
  constexpr std::size_t kLongest = 300;
  std::string out = printable(std::string_view(error.what()).substr(0, kLongest));
  // "[json.exception.parse_error.101] parse error at line 1, column 9: syntax error while parsing value - WHAT; last read: TEXT"
  const auto replace = [&](std::size_t at, std::string_view what, std::string_view by) {
    if (at != out.npos) out.replace(at, what.size(), by);
  };
  if (const auto name = out.find("] "); out.starts_with('[') && name != out.npos) out.erase(0, name + 2);
  if (!out.starts_with("parse error at ")) return out;
  replace(0, "parse error at ", "no JSON at ");
  replace(out.find("syntax error while parsing "), "syntax error while parsing ", "");
  replace(out.find(" - "), " - ", ": ");
  return out;
}

std::string shown(std::string_view text) {
  constexpr std::size_t kLongest = 60;
  return text.size() <= kLongest ? printable(text) : printable(text.substr(0, kLongest)) + "...";
}

void check_json_text(std::string_view text, std::string_view where) {
  // The parser takes NUL for the end and would not look at what follows.
  const auto nul = text.find('\0');
  shard::require(nul == text.npos, Code::BadFormat,
                 [&] { return fmt::format("{}: JSON: byte {} is NUL; should be text", where, nul); });
}

nlohmann::json parse_json(std::string_view text, std::string_view where) {
  constexpr int kDeepest = 256;
  constexpr std::size_t kLongest = 256u << 20;
  shard::require(text.size() <= kLongest, Code::BadFormat, [&] {
    return fmt::format("{}: {} bytes of JSON; should be at most {}", where, text.size(), kLongest);
  });
  check_json_text(text, where);
  std::vector<std::set<std::string, std::less<>>> keys;
  const auto watch = [&](int depth, nlohmann::json::parse_event_t event, nlohmann::json& value) {
    using Event = nlohmann::json::parse_event_t;
    shard::require(depth < kDeepest, Code::BadFormat,
                   [&] { return fmt::format("{}: JSON is nested deeper than {}", where, kDeepest); });
    if (event == Event::object_start) keys.emplace_back();
    if (event == Event::object_end) keys.pop_back();
    if (event == Event::key)
      shard::require(keys.back().insert(value.get_ref<const std::string&>()).second, Code::BadFormat,
                     [&] { return fmt::format("{}: key {} stands twice", where, value.dump()); });
    return true;
  };
  try {
    return nlohmann::json::parse(text, watch);
  } catch (const nlohmann::json::exception& error) {
    shard::fail(Code::BadFormat, "{}: {}", where, json_problem(error));
  }
}

}  // namespace formats
