// The bytes of a pickle while it is read: numbers, lines and texts that are there in full, or an error that
// says where.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "libshard/error.h"

namespace formats::pickle {

/// The bytes end within the pickle.
struct Truncated : shard::Error {
  using Error::Error;
};

/// For error texts: names are input from a stranger.
std::string printable(std::string_view text);
/// As Python's "surrogatepass": lone surrogates are legal, overlong forms are not.
bool is_utf8(std::string_view text);
/// Two's complement, little endian, of decimal digits.
std::string binary(std::string_view digits, bool negative);

class Input {
 public:
  explicit Input(std::span<const std::byte> bytes)
      : start_(reinterpret_cast<const unsigned char*>(bytes.data())),
        at_(start_),
        end_(start_ + bytes.size()) {}
  std::size_t size() const { return static_cast<std::size_t>(end_ - start_); }
  std::size_t used() const { return static_cast<std::size_t>(at_ - start_); }
  std::size_t left() const { return static_cast<std::size_t>(end_ - at_); }
  /// The next opcode; errors from here on name its position.
  unsigned opcode() {
    op_ = at_;
    return byte();
  }
  template <typename... Args>
  [[noreturn]] void refuse(fmt::format_string<Args...> format, Args&&... args) const {
    throw shard::Error(shard::Code::BadFormat, where() + fmt::format(format, std::forward<Args>(args)...));
  }

  void need(std::uint64_t bytes) const {
    if (bytes > left()) [[unlikely]]
      throw Truncated(shard::Code::BadFormat,
                      where() + fmt::format("ends within a value: {} bytes left, {} needed", left(), bytes));
  }
  unsigned byte() {
    need(1);
    return *at_++;
  }
  std::uint64_t number(std::size_t bytes) {
    need(bytes);
    std::uint64_t value = 0;
    for (std::size_t i = bytes; i-- > 0;) value = value << 8 | at_[i];
    at_ += bytes;
    return value;
  }
  std::string_view take(std::uint64_t bytes) {
    need(bytes);
    const auto* const from = reinterpret_cast<const char*>(at_);
    at_ += bytes;
    return {from, static_cast<std::size_t>(bytes)};
  }
  /// Up to the next line feed, which is taken too.
  std::string_view line();
  std::string_view checked_text(std::string_view text) const {
    if (!is_utf8(text)) refuse("text that is no UTF-8");
    return text;
  }

 private:
  std::string where() const { return fmt::format("pickle byte {}: ", op_ - start_); }
  const unsigned char *start_, *at_, *end_;
  const unsigned char* op_ = start_;
};

}  // namespace formats::pickle
