// Written beside and renamed; only what has no place beside it, a pipe say, is written as it is.
#include "cli/report_files.h"

#include "formats/file.h"
#include "formats/publication.h"
#include "libshard/error.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>

#include <fcntl.h>
#include <unistd.h>

namespace cli {
namespace {

namespace fs = std::filesystem;
using shard::Code;

struct Place {
  fs::path path;         ///< with links resolved: a link stays one
  bool exists = false, in_place = false;
};

fs::path folder_of(const fs::path& path) { return path.has_parent_path() ? path.parent_path() : fs::path("."); }

Place place_of(const std::string& path) {
  std::error_code error;
  const auto status = fs::status(path, error);
  if (fs::exists(status) && !fs::is_regular_file(status)) return {path, true, true};
  const auto real = fs::weakly_canonical(fs::absolute(path, error), error);
  Place out{error ? fs::path(path) : real, fs::exists(status), false};
  out.in_place = out.exists && ::access(folder_of(out.path).c_str(), W_OK) != 0;
  return out;
}

/// Both kinds of report begin so, and no file of a checkpoint does.
bool is_report(const fs::path& path) { return std::ifstream(path, std::ios::binary).peek() == '<'; }

void write_all(const fs::path& path, int flags, std::string_view text) {
  const int fd = ::open(path.c_str(), O_WRONLY | O_CLOEXEC | flags, 0666);
  bool good = fd >= 0;
  while (good && !text.empty()) {
    const auto n = ::write(fd, text.data(), text.size());
    if (n < 0 && errno == EINTR) continue;
    good = n > 0;
    if (good) text.remove_prefix(static_cast<std::size_t>(n));
  }
  const int why = errno;
  if (fd >= 0 && ::close(fd) != 0 && good) throw std::system_error(errno, std::generic_category());
  if (!good) throw std::system_error(why, std::generic_category());
}

}  // namespace

void require_writable(const std::vector<ReportFile>& reports, const fs::path& checkpoint) {
  std::vector<fs::path> seen;
  for (const auto& [flag, path] : reports) {
    if (path.empty()) continue;
    shard::require(path != "-", Code::Usage, [&, flag = flag] { return fmt::format("{} -: should be a file; --json prints on stdout (./- is a file of that name)", flag); });
    const auto place = place_of(path);
    const auto named = [&, flag = flag, &path = path](const std::string& what) { return fmt::format("{} {}: {}", flag, path, what); };
    shard::require(!fs::is_directory(place.path), Code::Io, [&] { return named("is a folder; should be a file"); });
    const auto target = place.in_place ? place.path : folder_of(place.path);
    shard::require(::access(target.c_str(), W_OK) == 0, Code::Io, [&] { return named(fmt::format("cannot write: {}", std::strerror(errno))); });
    shard::require(place.in_place || fs::is_directory(target), Code::Io, [&] { return named(fmt::format("cannot write: {} is no folder", target.string())); });
    if (place.exists && !fs::is_regular_file(place.path)) continue;
    shard::require(std::find(seen.begin(), seen.end(), place.path) == seen.end(), Code::Usage, [&] { return named("is another report's file, too; should be one of its own"); });
    seen.push_back(place.path);
    shard::require(!place.exists || is_report(place.path) || !formats::lies_in(place.path, checkpoint), Code::Usage, [&] { return named("is a file of the checkpoint; should be another"); });
  }
}

void write_text(const std::string& path, std::string_view text) {
  const auto place = place_of(path);
  const auto draft = place.in_place ? place.path : folder_of(place.path) / fmt::format("{}.{}", formats::sibling_stem(place.path), ::getpid());
  try {
    write_all(draft, O_CREAT | O_TRUNC | (place.in_place ? 0 : O_NOFOLLOW), text);
    if (!place.in_place) fs::rename(draft, place.path);
  } catch (const std::system_error& error) {
    std::error_code ignored;
    if (!place.in_place) fs::remove(draft, ignored);
    shard::fail(Code::Io, "{}: cannot write: {}", path, error.code().message());
  }
}

}  // namespace cli
