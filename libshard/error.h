// The one error type: where, what is, what should be; its code is also the exit status of the program.
#pragma once

#include <fmt/format.h>

#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

namespace shard {

/// What went wrong, as documented exit statuses.
enum class Code { Usage = 2, NotFound, BadFormat, BadLayout, Mismatch, Io, Device };

/// `what()` is one line, "WHERE: what is; what should be".
struct Error : std::runtime_error {
  Error(Code code, const std::string& text) : std::runtime_error(text), code(code) {}
  /// The same error, found while doing `step` (a path, a tensor): prefixes it once.
  Error within(std::string_view step) const { return Error(code, fmt::format("{}: {}", step, what())); }
  Code code;
};

/// Throws Error(code, text()) unless `good`; the text is only built on failure.
template <typename Text>
void require(bool good, Code code, Text&& text) {
  if (!good) [[unlikely]]
    throw Error(code, std::forward<Text>(text)());
}

template <typename... Args>
[[noreturn]] void fail(Code code, fmt::format_string<Args...> format, Args&&... args) {
  throw Error(code, fmt::format(format, std::forward<Args>(args)...));
}

}  // namespace shard
