// JUnit XML of a list of findings.
#include "cli/junit.h"

#include "cli/markup.h"
#include "cli/report_files.h"

#include <fmt/format.h>

#include <algorithm>

namespace cli {

void write_junit(const std::string& path, std::string_view suite, std::string_view name, std::span<const char* const> rules, const std::vector<shard::Finding>& findings) {
  std::vector<std::string> all(rules.begin(), rules.end());
  for (const auto& finding : findings)
    if (std::find(all.begin(), all.end(), finding.rule) == all.end()) all.push_back(finding.rule);
  std::size_t failures = 0;
  std::string cases;
  for (const auto& rule : all) {
    std::string text;
    for (const auto& finding : findings)
      if (finding.rule == rule && finding.severity == shard::Finding::Severity::Error) text += fmt::format("{}: {}\n", finding.key, finding.message);
    cases += fmt::format("  <testcase classname=\"{}\" name=\"{}\"", escaped(suite), escaped(rule));
    if (text.empty()) {
      cases += "/>\n";
      continue;
    }
    ++failures;
    cases += fmt::format("><failure message=\"{}\">{}</failure></testcase>\n", escaped(text.substr(0, text.find('\n'))), escaped(text));
  }
  write_text(path, fmt::format("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuite name=\"{}\" tests=\"{}\" failures=\"{}\">\n{}</testsuite>\n", escaped(name), all.size(), failures, cases));
}

}  // namespace cli
