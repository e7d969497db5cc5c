// The sibling's name tells whose it is; a lock held on it tells whether that process still lives.
#include "formats/publication.h"

#include <fcntl.h>
#include <stdio.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "formats/file.h"
#include "libshard/error.h"
#include "libshard/fnv1a.h"

namespace formats {
namespace {

namespace fs = std::filesystem;
using shard::Code;

constexpr unsigned kNoReplace = 1, kExchange = 2;  // RENAME_*, which not every libc names

[[noreturn]] void fail_with(const fs::path& path, const char* doing, const std::string& why) {
  shard::fail(Code::Io, "{}: {}: {}", path.string(), doing, why);
}

/// A descriptor of `path` that holds its lock; -1 with errno EWOULDBLOCK where another one does.
int open_locked(const fs::path& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
  if (fd < 0 || ::flock(fd, LOCK_EX | LOCK_NB) == 0) return fd;
  const int why = errno;
  ::close(fd);
  errno = why;
  return -1;
}

bool same_file(int fd, const fs::path& path) {
  struct stat open_one {
  }, named{};
  return ::fstat(fd, &open_one) == 0 && ::lstat(path.c_str(), &named) == 0 &&
         open_one.st_ino == named.st_ino && open_one.st_dev == named.st_dev;
}

void sync_one(const fs::path& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  const bool done = fd >= 0 && ::fsync(fd) == 0;
  const int error = errno;
  if (fd >= 0) ::close(fd);
  if (!done) fail_with(path, "cannot sync", std::strerror(error));
}

void sync_tree(const fs::path& root) {
  std::error_code error;
  for (fs::recursive_directory_iterator at(root, error), end; !error && at != end; at.increment(error))
    sync_one(at->path());
  if (error && error != std::errc::not_a_directory) fail_with(root, "cannot sync", error.message());
  sync_one(root);
}

constexpr const char* kOld = "-old";  // behind a staging name: what stood at the final name, while neither does

std::string prefix_of(const fs::path& final_path) { return sibling_stem(final_path) + ".shardkit-"; }

/// "PID-N", as stage() makes them: nobody else's file is called so by chance.
bool is_our_number(std::string_view text) {
  const auto dash = text.find('-');
  const auto digits = [](std::string_view part) { return !part.empty() && part.find_first_not_of("0123456789") == part.npos; };
  return dash != text.npos && digits(text.substr(0, dash)) && digits(text.substr(dash + 1));
}

std::vector<fs::path> siblings(const fs::path& final_path, std::string_view suffix) {
  const auto prefix = prefix_of(final_path);
  std::vector<fs::path> out;
  std::error_code error;
  for (fs::directory_iterator at(final_path.parent_path(), error), end; !error && at != end; at.increment(error)) {
    const auto name = at->path().filename().string();
    if (name.size() < prefix.size() + suffix.size() || !name.starts_with(prefix) || !name.ends_with(suffix)) continue;
    if (is_our_number(std::string_view(name).substr(prefix.size(), name.size() - prefix.size() - suffix.size()))) out.push_back(at->path());
  }
  return out;
}

/// Siblings that a killed process left behind: nobody holds their lock.
void remove_leavings(const fs::path& final_path) {
  for (const auto& path : siblings(final_path, "")) {
    const int lock = open_locked(path);
    if (lock < 0) continue;
    std::error_code ignored;
    fs::remove_all(path, ignored);
    ::close(lock);
  }
}

/// Makes `path`, which must not exist yet; false where it does.
bool make(const fs::path& path, Publication::Kind kind) {
  if (kind == Publication::Kind::Folder) {
    if (::mkdir(path.c_str(), 0777) == 0) return true;
  } else if (const int fd = ::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666); fd >= 0) {
    ::close(fd);
    return true;
  }
  if (errno != EEXIST) fail_with(path, "cannot create", std::strerror(errno));
  return false;
}

bool is_there(const fs::path& path) {
  std::error_code error;
  return fs::exists(fs::symlink_status(path, error));
}

/// A process that was killed between two renames left nothing under the final name: what stood there is put back. Whether it still lives, the
/// lock on its staging folder tells.
void put_back_old(const fs::path& final_path) {
  for (const auto& old : siblings(final_path, kOld)) {
    if (is_there(final_path)) return;  // somebody's since: neither is ours to remove
    const auto name = old.string();
    const int lock = open_locked(name.substr(0, name.size() - std::strlen(kOld)));
    if (lock < 0 && errno == EWOULDBLOCK) continue;
    if (::renameat2(AT_FDCWD, old.c_str(), AT_FDCWD, final_path.c_str(), kNoReplace) != 0 && (errno == EINVAL || errno == ENOSYS) && !is_there(final_path))
      ::rename(old.c_str(), final_path.c_str());
    if (lock >= 0) ::close(lock);
  }
}

void rename_or_fail(const fs::path& from, const fs::path& to) {
  if (::rename(from.c_str(), to.c_str()) != 0) fail_with(to, "cannot publish", std::strerror(errno));
}

}  // namespace

std::string sibling_stem(const fs::path& path) {
  constexpr std::size_t kLongest = 200, kKept = 160;  // of a name's 255 bytes
  const auto name = path.filename().string();
  if (name.size() <= kLongest) return "." + name;
  return fmt::format(".{}-{:016x}", name.substr(0, kKept), shard::fnv1a(std::as_bytes(std::span(name))));
}

Publication::Publication(const fs::path& final_path, bool force, Kind kind) : force_(force) {
  final_ = as_written(final_path);
  put_back_old(final_);
  shard::require(force || !is_there(final_), Code::Usage,
                 [&] { return fmt::format("{}: exists; --force replaces it", final_path.string()); });
  std::error_code error;
  fs::create_directories(final_.parent_path(), error);
  if (error) fail_with(final_.parent_path(), "cannot create", error.message());
  remove_leavings(final_);
  stage(kind);
  complete_ = staging_;
}

void Publication::restore(const fs::path& final_path) { put_back_old(as_written(final_path)); }

Publication::Publication(Adopted adopted, const fs::path& final_path, bool force)
    : complete_(std::move(adopted.folder)), force_(force), adopted_(true) {
  final_ = as_written(final_path);
}

void Publication::stage(Kind kind) {
  for (unsigned n = 0;; ++n) {
    staging_ = final_.parent_path() / fmt::format("{}{}-{}", prefix_of(final_), ::getpid(), n);
    if (!make(staging_, kind)) continue;
    lock_ = open_locked(staging_);
    // Before the lock was held another process may have taken it for a leaving.
    if (lock_ >= 0 ? same_file(lock_, staging_) : errno != EWOULDBLOCK && errno != ENOENT) break;
    if (lock_ >= 0) ::close(lock_);
    lock_ = -1;
  }
  for (int& fd : spare_) fd = lock_ >= 0 ? ::fcntl(lock_, F_DUPFD_CLOEXEC, 0) : -1;
}

void Publication::let_go() {
  for (int& fd : spare_)
    if (fd >= 0) ::close(std::exchange(fd, -1));
  if (lock_ >= 0) ::close(std::exchange(lock_, -1));
}

Publication::~Publication() {
  let_go();
  std::error_code error;
  if (!committed_ && !staging_.empty()) fs::remove_all(staging_, error);
}

/// What stood there; by a staging name the next run knows it, too.
void Publication::remove_old(const fs::path& old) {
  let_go();
  std::error_code error;
  fs::remove_all(old, error);
  if (error && is_there(old)) left_over_ = old.string();
}

void Publication::commit(bool sync) {
  if (sync) sync_tree(complete_);
  if (::renameat2(AT_FDCWD, complete_.c_str(), AT_FDCWD, final_.c_str(), kNoReplace) == 0)
    committed_ = true;
  else if (errno == EEXIST || errno == EINVAL || errno == ENOSYS)
    replace();
  else
    fail_with(final_, "cannot publish", std::strerror(errno));
  if (sync) sync_one(final_.parent_path());
}

/// Where something stands in the way, or the file system cannot promise that nothing does.
void Publication::replace() {
  if (!is_there(final_)) {
    rename_or_fail(complete_, final_);
    committed_ = true;
    return;
  }
  shard::require(force_, Code::Usage,
                 [&] { return fmt::format("{}: exists by now; --force replaces it", final_.string()); });
  if (::renameat2(AT_FDCWD, complete_.c_str(), AT_FDCWD, final_.c_str(), kExchange) == 0) {
    committed_ = true;
    return remove_old(complete_);
  }
  if (errno != EINVAL && errno != ENOSYS) fail_with(final_, "cannot replace", std::strerror(errno));
  if (adopted_) stage(Kind::Folder);  // whatever happens, the next run finds the old one by this name and knows by its lock whether we live
  const auto old = fs::path(staging_.string() + kOld);
  rename_or_fail(final_, old);
  if (::rename(complete_.c_str(), final_.c_str()) != 0) {
    const std::string why = std::strerror(errno);
    ::rename(old.c_str(), final_.c_str());
    fail_with(final_, "cannot replace", why);
  }
  committed_ = true;
  if (adopted_) ::rmdir(staging_.c_str());
  remove_old(::rename(old.c_str(), staging_.c_str()) == 0 ? staging_ : old);  // what is published is, whether the old one can go or not
}

}  // namespace formats
