// Findings as JUnit XML, the file that CI systems show.
#pragma once

#include "libshard/state_dict.h"

#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace cli {

/// One test case a rule, failed where a finding of that rule is an error; rules that findings name beyond `rules` are
/// added. Text that is no XML 1.0 in UTF-8 is replaced. Throws Io.
void write_junit(const std::string& path, std::string_view suite, std::string_view name, std::span<const char* const> rules, const std::vector<shard::Finding>& findings);

}  // namespace cli
