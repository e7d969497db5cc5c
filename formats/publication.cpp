// The sibling's name tells whose it is; a lock held on it tells whether that process still lives.
#include "formats/publication.h"

#include <fcntl.h>
#include <stdio.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string>

#include "libshard/error.h"

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

std::string prefix_of(const fs::path& final_path) {
  return "." + final_path.filename().string() + ".shardkit-";
}

/// Siblings that a killed process left behind: nobody holds their lock.
void remove_leavings(const fs::path& final_path) {
  const auto prefix = prefix_of(final_path);
  std::error_code error;
  for (fs::directory_iterator at(final_path.parent_path(), error), end; !error && at != end;
       at.increment(error)) {
    if (!at->path().filename().string().starts_with(prefix)) continue;
    const int lock = open_locked(at->path());
    if (lock < 0) continue;
    std::error_code ignored;
    fs::remove_all(at->path(), ignored);
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

void rename_or_fail(const fs::path& from, const fs::path& to) {
  if (::rename(from.c_str(), to.c_str()) != 0) fail_with(to, "cannot publish", std::strerror(errno));
}

}  // namespace

Publication::Publication(const fs::path& final_path, bool force, Kind kind) : force_(force) {
  final_ = fs::absolute(final_path).lexically_normal();
  if (final_.filename().empty()) final_ = final_.parent_path();
  shard::require(force || !is_there(final_), Code::Usage,
                 [&] { return fmt::format("{}: exists; --force replaces it", final_path.string()); });
  std::error_code error;
  fs::create_directories(final_.parent_path(), error);
  if (error) fail_with(final_.parent_path(), "cannot create", error.message());
  remove_leavings(final_);
  stage(kind);
}

Publication::Publication(Adopted adopted, const fs::path& final_path, bool force) : staging_(std::move(adopted.folder)), force_(force) {
  final_ = fs::absolute(final_path).lexically_normal();
  if (final_.filename().empty()) final_ = final_.parent_path();
}

void Publication::stage(Kind kind) {
  for (unsigned n = 0;; ++n) {
    staging_ = final_.parent_path() / fmt::format("{}{}-{}", prefix_of(final_), ::getpid(), n);
    if (!make(staging_, kind)) continue;
    lock_ = open_locked(staging_);
    // Before the lock was held another process may have taken it for a leaving.
    if (lock_ >= 0 ? same_file(lock_, staging_) : errno != EWOULDBLOCK && errno != ENOENT) return;
    if (lock_ >= 0) ::close(lock_);
    lock_ = -1;
  }
}

Publication::~Publication() {
  std::error_code error;
  if (!committed_) fs::remove_all(staging_, error);
  if (lock_ >= 0) ::close(lock_);
}

void Publication::commit(bool sync) {
  if (sync) sync_tree(staging_);
  if (::renameat2(AT_FDCWD, staging_.c_str(), AT_FDCWD, final_.c_str(), kNoReplace) == 0)
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
    rename_or_fail(staging_, final_);
    committed_ = true;
    return;
  }
  shard::require(force_, Code::Usage,
                 [&] { return fmt::format("{}: exists by now; --force replaces it", final_.string()); });
  std::error_code error;
  if (::renameat2(AT_FDCWD, staging_.c_str(), AT_FDCWD, final_.c_str(), kExchange) == 0) {
    committed_ = true;
    fs::remove_all(staging_, error);
    return;
  }
  if (errno != EINVAL && errno != ENOSYS) fail_with(final_, "cannot replace", std::strerror(errno));
  const auto old = fs::path(staging_.string() + "-old");
  rename_or_fail(final_, old);
  if (::rename(staging_.c_str(), final_.c_str()) != 0) {
    const std::string why = std::strerror(errno);
    ::rename(old.c_str(), final_.c_str());
    fail_with(final_, "cannot replace", why);
  }
  committed_ = true;
  fs::remove_all(old, error);
}

}  // namespace formats
