// Files that a command writes beside its answer (--html, --junit, --report).
#pragma once

#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

namespace cli {

struct ReportFile {
  const char* flag;
  std::string path;  ///< "": not asked for
};

/// To be asked before the work. Throws Usage where two are one file, or where one would replace a file of the checkpoint that is no such report; Io where it
/// could not be written.
void require_writable(const std::vector<ReportFile>& reports, const std::filesystem::path& checkpoint);
/// Whole, or what was there before. Throws Io.
void write_text(const std::string& path, std::string_view text);

}  // namespace cli
