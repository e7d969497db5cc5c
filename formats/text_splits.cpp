// Patterns run in PCRE2, normal forms in utf8proc; bytes become letters as GPT-2's table has them.
#include "formats/text_splits.h"

#include "formats/json.h"
#include "formats/pattern.h"
#include "libshard/error.h"
#include "libshard/stop.h"

#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <memory>

namespace formats {
namespace {

using nlohmann::json;
using shard::Code;

constexpr const char* kGpt2 = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
constexpr int kMostMarks = 128;  // in a row; utf8proc puts them in order in the square of their number
constexpr std::uint32_t kMostMatching = 10'000'000;  // steps before a pattern is given up

enum class Behaviour { Isolated, Removed, MergedWithPrevious, MergedWithNext, Contiguous };

Behaviour behaviour_of(const std::string& name) {
  if (name == "Isolated") return Behaviour::Isolated;
  if (name == "Removed") return Behaviour::Removed;
  if (name == "MergedWithPrevious") return Behaviour::MergedWithPrevious;
  if (name == "MergedWithNext") return Behaviour::MergedWithNext;
  if (name == "Contiguous") return Behaviour::Contiguous;
  shard::fail(Code::BadFormat, "split behaviour '{}' is not supported", shown(name));
}

struct Piece {
  std::size_t begin, end;
  bool matched;
};

std::vector<Piece> pieces_of(const Pattern& pattern, const std::string& text, bool invert, const std::atomic<bool>* stop) {
  std::vector<Piece> out;
  for (std::size_t at = 0; at < text.size();) {
    shard::refuse_stopped(stop);
    const auto [begin, end] = pattern.next(text, at);
    const auto stop = begin == text.npos ? text.size() : begin;
    if (stop > at) out.push_back({at, stop, invert});
    if (begin == text.npos) break;
    out.push_back({begin, end, !invert});
    at = end;
  }
  return out;
}

void cut(const std::string& text, const std::vector<Piece>& pieces, Behaviour behaviour, std::vector<std::string>& out) {
  std::string held;  // MergedWithNext: what waits for its next
  for (std::size_t i = 0; i < pieces.size(); ++i) {
    const auto& piece = pieces[i];
    auto part = text.substr(piece.begin, piece.end - piece.begin);
    const bool after = i > 0;
    if (piece.matched && behaviour == Behaviour::Removed) continue;
    if (piece.matched && behaviour == Behaviour::MergedWithPrevious && after && !pieces[i - 1].matched) out.back() += part;
    else if (behaviour == Behaviour::Contiguous && after && piece.matched == pieces[i - 1].matched) out.back() += part;
    else if (piece.matched && behaviour == Behaviour::MergedWithNext) {
      if (!held.empty()) out.push_back(std::move(held));
      held = std::move(part);
    } else {
      out.push_back(std::move(held) + part);
      held.clear();
    }
  }
  if (!held.empty()) out.push_back(std::move(held));
}

Split by_pattern(const std::string& text, const std::string& behaviour, bool invert) {
  return [pattern = Pattern(text, "pre_tokenizer", kMostMatching), how = behaviour_of(behaviour), invert](const std::string& piece, bool, const std::atomic<bool>* stop, std::vector<std::string>& out) {
    cut(piece, pieces_of(pattern, piece, invert, stop), how, out);
  };
}

/// GPT-2's letters: printable bytes stand for themselves, the others for code points from 256 on.
const std::array<std::string, 256>& byte_letters() {
  static const auto letters = [] {
    std::array<std::string, 256> out;
    int next = 256;
    for (int byte = 0; byte < 256; ++byte) {
      const bool plain = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
      const int code = plain ? byte : next++;
      utf8proc_uint8_t buffer[4];
      const auto size = utf8proc_encode_char(code, buffer);
      out[static_cast<std::size_t>(byte)].assign(reinterpret_cast<const char*>(buffer), static_cast<std::size_t>(size));
    }
    return out;
  }();
  return letters;
}

void to_letters(const std::string& text, bool, const std::atomic<bool>*, std::vector<std::string>& out) {
  std::string letters;
  for (const char c : text) letters += byte_letters()[static_cast<unsigned char>(c)];
  if (!letters.empty()) out.push_back(std::move(letters));
}

Split metaspace(const json& step) {
  const auto mark = step.value("replacement", std::string("\xe2\x96\x81"));
  const auto letters = std::count_if(mark.begin(), mark.end(), [](char c) { return (c & 0xc0) != 0x80; });
  shard::require(letters == 1, Code::BadFormat, [&] { return fmt::format("Metaspace puts '{}' for a space; should be one character", shown(mark)); });
  const auto scheme = step.value("prepend_scheme", step.value("add_prefix_space", true) ? std::string("always") : std::string("never"));
  const bool split = step.value("split", true);
  return [=](const std::string& text, bool first, const std::atomic<bool>*, std::vector<std::string>& out) {
    std::string marked;
    for (const char c : text) c == ' ' ? marked += mark : marked += c;
    if ((scheme == "always" || (scheme == "first" && first)) && !marked.starts_with(mark)) marked = mark + marked;
    if (!split) return out.push_back(std::move(marked));
    for (std::size_t at = 0; at < marked.size();) {  // a mark begins a piece
      const auto end = std::min(marked.find(mark, at + mark.size()), marked.size());
      out.push_back(marked.substr(at, end - at));
      at = end;
    }
  };
}

}  // namespace

void add_splits(const json& step, std::vector<Split>& out) {
  if (step.is_null()) return;
  const auto type = step.value("type", std::string());
  if (type == "Sequence") {
    for (const auto& inner : step.at("pretokenizers")) add_splits(inner, out);
  } else if (type == "ByteLevel") {
    if (step.value("add_prefix_space", true))
      out.push_back([](const std::string& text, bool, const std::atomic<bool>*, std::vector<std::string>& pieces) { pieces.push_back(text.starts_with(' ') ? text : " " + text); });
    if (step.value("use_regex", true)) out.push_back(by_pattern(kGpt2, "Isolated", false));
    out.push_back(to_letters);
  } else if (type == "Split") {
    const auto& pattern = step.at("pattern");
    std::string text;
    if (pattern.contains("Regex")) text = pattern["Regex"].get<std::string>();
    else text = "\\Q" + pattern.at("String").get<std::string>() + "\\E";
    out.push_back(by_pattern(text, step.value("behavior", std::string("Isolated")), step.value("invert", false)));
  } else if (type == "Digits") {
    out.push_back(by_pattern("\\p{N}", step.value("individual_digits", false) ? "Isolated" : "Contiguous", false));
  } else if (type == "Metaspace") {
    out.push_back(metaspace(step));
  } else if (type == "Whitespace") {
    out.push_back(by_pattern("\\w+|[^\\w\\s]+", "Removed", true));
  } else if (type == "WhitespaceSplit") {
    out.push_back(by_pattern("\\s", "Removed", false));
  } else if (type == "Punctuation") {
    out.push_back(by_pattern("[[:punct:]]|\\p{P}", step.value("behavior", std::string("Isolated")), false));
  } else {
    shard::fail(Code::BadFormat, "pre-tokenizer '{}' is not supported", shown(type));
  }
}

bool is_utf8(std::string_view text) {
  for (std::size_t at = 0; at < text.size();) {
    utf8proc_int32_t code = 0;
    const auto size = utf8proc_iterate(reinterpret_cast<const utf8proc_uint8_t*>(text.data()) + at, static_cast<utf8proc_ssize_t>(text.size() - at), &code);
    if (size <= 0) return false;
    at += static_cast<std::size_t>(size);
  }
  return true;
}

namespace {

void refuse_many_marks(std::string_view text, utf8proc_option_t options) {
  int marks = 0;
  for (std::size_t at = 0; at < text.size();) {
    utf8proc_int32_t code = 0, parts[32];
    at += static_cast<std::size_t>(std::max<utf8proc_ssize_t>(1, utf8proc_iterate(reinterpret_cast<const utf8proc_uint8_t*>(text.data()) + at, static_cast<utf8proc_ssize_t>(text.size() - at), &code)));
    int boundary = 0;
    const auto count = std::min<utf8proc_ssize_t>(std::size(parts), utf8proc_decompose_char(code, parts, std::size(parts), options, &boundary));
    for (utf8proc_ssize_t i = 0; i < count; ++i) marks = utf8proc_get_property(parts[i])->combining_class ? marks + 1 : 0;
    shard::require(marks <= kMostMarks, Code::BadFormat, [] { return fmt::format("cannot normalise a text with more than {} combining marks in a row", kMostMarks); });
  }
}

}  // namespace

std::string normal_form(const std::string& text, const std::string& form) {
  int options = UTF8PROC_STABLE | (form.ends_with('C') ? UTF8PROC_COMPOSE : UTF8PROC_DECOMPOSE);
  if (form.find('K') != form.npos) options |= UTF8PROC_COMPAT;
  refuse_many_marks(text, static_cast<utf8proc_option_t>(options));
  utf8proc_uint8_t* made = nullptr;
  const auto size = utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data()), static_cast<utf8proc_ssize_t>(text.size()), &made, static_cast<utf8proc_option_t>(options));
  shard::require(size >= 0, Code::BadFormat, [] { return "the text cannot be normalised"; });
  const std::unique_ptr<utf8proc_uint8_t, decltype(&std::free)> owner(made, std::free);
  return {reinterpret_cast<const char*>(made), static_cast<std::size_t>(size)};
}

}  // namespace formats
