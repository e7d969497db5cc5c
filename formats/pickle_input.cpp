// Taking apart what a pickle holds as text. Refuses lines without an end.
#include "formats/pickle_input.h"

#include <algorithm>
#include <cstring>

namespace formats::pickle {
namespace {

constexpr std::size_t kLine = 1 << 16;  // of a text opcode's argument

std::size_t utf8_length(unsigned char lead) {
  if (lead < 0x80) return 1;
  if (lead >= 0xC2 && lead < 0xE0) return 2;
  if (lead >= 0xE0 && lead < 0xF0) return 3;
  return lead >= 0xF0 && lead < 0xF5 ? 4 : 0;
}

}  // namespace

std::string printable(std::string_view text) {
  std::string shown(text.substr(0, 100));
  std::replace_if(
      shown.begin(), shown.end(), [](char c) { return static_cast<unsigned char>(c) < 0x20 || c == 0x7F; },
      '?');
  return shown;
}

bool is_utf8(std::string_view text) {
  const auto* at = reinterpret_cast<const unsigned char*>(text.data());
  const auto* const end = at + text.size();
  while (at < end) {
    std::uint64_t eight = 0;
    while (end - at >= 8 && (std::memcpy(&eight, at, 8), (eight & 0x8080808080808080u) == 0)) at += 8;
    if (at == end) break;
    if (*at < 0x80) {
      ++at;
      continue;
    }
    const std::size_t length = utf8_length(*at);
    if (length == 0 || static_cast<std::size_t>(end - at) < length) return false;
    for (std::size_t i = 1; i < length; ++i) {
      if ((at[i] & 0xC0) != 0x80) return false;
    }
    if (*at == 0xE0 && at[1] < 0xA0) return false;
    if (*at == 0xF0 && at[1] < 0x90) return false;
    if (*at == 0xF4 && at[1] >= 0x90) return false;
    at += length;
  }
  return true;
}

std::string binary(std::string_view digits, bool negative) {
  std::string bytes(1, '\0');
  for (const char digit : digits) {
    unsigned carry = static_cast<unsigned>(digit - '0');
    for (char& byte : bytes) {
      carry += static_cast<unsigned char>(byte) * 10u;
      byte = static_cast<char>(carry);
      carry >>= 8;
    }
    if (carry) bytes.push_back(static_cast<char>(carry));
  }
  bytes.push_back('\0');
  unsigned carry = 1;
  for (char& byte : bytes) {
    if (!negative) break;
    carry += static_cast<unsigned char>(~byte);
    byte = static_cast<char>(carry);
    carry >>= 8;
  }
  return bytes;
}

std::string_view Input::line() {
  const std::size_t window = std::min(left(), kLine);
  const void* const found = window ? std::memchr(at_, '\n', window) : nullptr;
  if (!found) {
    if (window == kLine) refuse("a line of more than {} bytes", kLine);
    need(std::uint64_t{left()} + 1);
  }
  const auto text = take(static_cast<std::size_t>(static_cast<const unsigned char*>(found) - at_));
  ++at_;
  return text;
}

}  // namespace formats::pickle
