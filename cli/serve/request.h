// What a client may ask for: the body of POST /validate, with every path kept inside the root.
#pragma once

#include "cli/validate.h"

#include <filesystem>
#include <optional>
#include <string>
#include <string_view>

namespace cli {

/// A request that is answered with an error at once.
struct Refusal {
  int http_status = 400;
  std::string error;  ///< one line
  int status = 2;     ///< shardkit's exit status
};

/// `given` (relative to `root`, or absolute) with symlinks resolved, relative to `root`. Throws Refusal: 403 outside, 404 absent.
std::string confined(const std::filesystem::path& root, const std::string& key, const std::string& given);

/// Throws Refusal for anything but an object of the known keys. Paths are relative to `root`, which must be the working folder.
ValidateAsk read_ask(const std::filesystem::path& root, std::string_view body);

/// A message that names flags of the command line, with this page's keys in their place.
std::string in_words_of_a_request(std::string message);

}  // namespace cli
