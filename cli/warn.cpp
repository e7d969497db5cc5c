// Keys and messages come from files.
#include "cli/warn.h"

#include "cli/markup.h"

#include <fmt/core.h>

namespace cli {

void warn_of(const std::vector<shard::Finding>& findings) {
  for (const auto& finding : findings) {
    if (finding.severity != shard::Finding::Severity::Warning) continue;
    fmt::print(stderr, "{}\n", one_line(fmt::format("shardkit: warning: {}: {}", finding.key, finding.message)));
  }
}

}  // namespace cli
