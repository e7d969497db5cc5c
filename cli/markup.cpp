// Keys come from strangers: whatever bytes they hold, the page stays HTML, the report XML and a line a line.
#include "cli/markup.h"

#include <algorithm>

namespace cli {
namespace {

/// Length of the UTF-8 character that starts at `at` and XML allows; 0 where there is none.
std::size_t character(std::string_view text, std::size_t at) {
  const auto byte = [&](std::size_t i) { return i < text.size() ? static_cast<unsigned char>(text[i]) : 0u; };
  const auto first = byte(at);
  if (first < 0x80) return first >= 0x20 || first == '\n' || first == '\t' ? 1 : 0;
  const std::size_t length = first >= 0xc2 && first < 0xe0 ? 2 : first >= 0xe0 && first < 0xf0 ? 3 : first >= 0xf0 && first < 0xf5 ? 4 : 0;
  auto code = first & (0x7fu >> length);
  for (std::size_t i = 1; i < length; ++i) {
    if ((byte(at + i) & 0xc0) != 0x80) return 0;
    code = code << 6 | (byte(at + i) & 0x3f);
  }
  constexpr unsigned kLeast[] = {0, 0, 0x80, 0x800, 0x10000};
  const bool allowed = length && code >= kLeast[length] && code <= 0x10ffff && (code < 0xd800 || code > 0xdfff) && code != 0xfffe && code != 0xffff;
  return allowed ? length : 0;
}

}  // namespace

std::string printable(std::string_view text) {
  std::string out;
  for (std::size_t at = 0; at < text.size();) {
    const auto length = character(text, at);
    if (length) out += text.substr(at, length);
    else out += '?';
    at += std::max<std::size_t>(length, 1);
  }
  return out;
}

std::string escaped(std::string_view text) {
  std::string out;
  for (const char c : printable(text)) {
    if (c == '&') out += "&amp;";
    else if (c == '<') out += "&lt;";
    else if (c == '>') out += "&gt;";
    else if (c == '"') out += "&quot;";
    else if (c == '\'') out += "&#39;";
    else out += c;
  }
  return out;
}

std::string one_line(std::string_view text) {
  const auto all = printable(text);
  std::string out;
  for (std::size_t at = 0; at < all.size();) {
    const auto length = character(all, at);
    const auto one = std::string_view(all).substr(at, length);
    const bool control = one == "\x7f" || (one >= "\xc2\x80" && one <= "\xc2\x9f");
    const bool turns = (one >= "\xe2\x80\xa8" && one <= "\xe2\x80\xae") || (one >= "\xe2\x81\xa6" && one <= "\xe2\x81\xa9");  // and ends a line or paragraph
    if (one == "\n" || one == "\t") out += ' ';
    else if (control || turns) out += '?';
    else out += one;
    at += length;
  }
  return out;
}

}  // namespace cli
