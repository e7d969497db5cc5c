// nlohmann's parser, which does not recurse, behind a walk that watches depth and keys.
#include "formats/json.h"

#include <string>
#include <unordered_set>
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

/// What nlohmann's parser takes and we do not: a first walk, since its callback looks at all that an object holds whenever something in it ends.
class Watch final : public nlohmann::json::json_sax_t {
 public:
  explicit Watch(std::string_view where) : where_(where) {}
  bool null() override { return value(); }
  bool boolean(bool) override { return value(); }
  bool number_integer(number_integer_t) override { return value(); }
  bool number_unsigned(number_unsigned_t) override { return value(); }
  bool number_float(number_float_t, const string_t&) override { return value(); }
  bool string(string_t&) override { return value(); }
  bool binary(binary_t&) override { return value(); }
  bool start_object(std::size_t) override { return start(); }
  bool end_object() override { return end(); }
  bool start_array(std::size_t) override { return start(); }
  bool end_array() override { return end(); }
  bool key(string_t& name) override {
    shard::require(keys_.back().insert(name).second, Code::BadFormat, [&] { return fmt::format("{}: key {} stands twice", where_, nlohmann::json(name).dump()); });
    return value();
  }
  bool parse_error(std::size_t, const std::string&, const nlohmann::json::exception&) override { return false; }

 private:
  bool value() const {
    shard::require(keys_.size() < kDeepest, Code::BadFormat, [&] { return fmt::format("{}: JSON is nested deeper than {}", where_, kDeepest); });
    return true;
  }
  bool start() {
    value();
    keys_.emplace_back();
    return true;
  }
  bool end() {
    keys_.pop_back();
    return true;
  }

  static constexpr std::size_t kDeepest = 256;
  std::string_view where_;
  std::vector<std::unordered_set<std::string>> keys_;  // of objects and arrays that are open
};

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
  constexpr std::size_t kLongest = 256u << 20;
  shard::require(text.size() <= kLongest, Code::BadFormat, [&] {
    return fmt::format("{}: {} bytes of JSON; should be at most {}", where, text.size(), kLongest);
  });
  check_json_text(text, where);
  Watch watch(where);
  nlohmann::json::sax_parse(text, &watch);  // where the text is no JSON, what follows says so
  try {
    return nlohmann::json::parse(text);
  } catch (const nlohmann::json::exception& error) {
    shard::fail(Code::BadFormat, "{}: {}", where, json_problem(error));
  }
}

}  // namespace formats
