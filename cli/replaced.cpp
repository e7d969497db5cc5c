// Paths are compared twice: as they are written, which is how DST is replaced, and with their links resolved.
#include "cli/replaced.h"

#include "formats/file.h"
#include "libshard/error.h"

#include <algorithm>

namespace cli {
namespace {

namespace fs = std::filesystem;
using shard::Code;

bool leads_down(const fs::path& relative) { return !relative.empty() && *relative.begin() != ".."; }

void refuse_report(const fs::path& report, const fs::path& name, const std::vector<std::string>& files) {
  const auto refuse = [&](Code code, const char* what) { shard::fail(code, "--report {}: {}", report.string(), what); };
  if (name == "." || !report.has_filename()) refuse(Code::Io, "is a folder; should be a file");
  bool has_folder = !name.has_parent_path();
  for (const auto& file : files) {
    if (name == fs::path(file)) refuse(Code::Usage, "is a file of the output; should be another");
    if (leads_down(fs::path(file).lexically_relative(name))) refuse(Code::Usage, "is a folder of the output; should be a file");
    has_folder = has_folder || leads_down(fs::path(file).lexically_relative(name.parent_path()));
  }
  if (!has_folder) refuse(Code::Io, "cannot write: its folder is none of the output's");
}

}  // namespace

void refuse_source_in_target(const fs::path& target, const std::vector<fs::path>& read, const formats::Checkpoint& source) {
  const auto written = formats::as_written(target);
  if (!fs::exists(fs::symlink_status(written))) return;
  const auto check = [&](const fs::path& path) {
    shard::require(path.empty() || !fs::exists(path) || !(formats::lies_in(path, written) || formats::lies_in(path, target)), Code::Usage,
                   [&] { return fmt::format("{}: --force would remove {}, which is read; should be a folder that is or holds no source", target.string(), path.string()); });
  };
  for (const auto& path : read) check(path);
  check(source.folder);
  for (const auto& file : source.stored.files) check(source.folder / file);
}

std::string lost_iterations(const fs::path& target) {
  std::vector<std::string> found;
  std::error_code error;
  for (fs::directory_iterator at(target, error), end; !error && at != end; at.increment(error))
    if (const auto name = at->path().filename().string(); formats::names_iteration(name)) found.push_back(name);
  if (found.size() < 2) return "";
  std::sort(found.begin(), found.end());
  return fmt::format("--force replaces the whole of {}, which held {} iterations ({} to {})", target.string(), found.size(), found.front(), found.back());
}

void refuse_report_in_target(const fs::path& report, const fs::path& target, const std::vector<std::string>& files, bool late) {
  if (report.empty()) return;
  const auto check = [&](const fs::path& name) {
    if (!leads_down(name)) return;
    shard::require(!late, Code::Usage, [&] { return fmt::format("--report {}: lies in DST, which may not be there when this ends; should lie elsewhere", report.string()); });
    refuse_report(report, name, files);
  };
  check(formats::as_written(report).lexically_relative(formats::as_written(target)));
  check(fs::weakly_canonical(formats::as_written(report)).lexically_relative(fs::weakly_canonical(formats::as_written(target))));
}

}  // namespace cli
