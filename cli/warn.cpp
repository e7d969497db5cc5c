// Keys and messages come from files.
#include "cli/warn.h"

#include <fmt/core.h>

#include <algorithm>

namespace cli {

void warn_of(const std::vector<shard::Finding>& findings) {
  for (const auto& finding : findings) {
    if (finding.severity != shard::Finding::Severity::Warning) continue;
    auto line = fmt::format("shardkit: warning: {}: {}", finding.key, finding.message);
    std::replace_if(line.begin(), line.end(), [](char c) { return static_cast<unsigned char>(c) < 0x20 || c == 0x7f; }, ' ');
    fmt::print(stderr, "{}\n", line);
  }
}

}  // namespace cli
