// The sibling's name tells whose it is; a lock held on it tells whether that process still lives.
#include "formats/publication.h"

#include "libshard/error.h"

#include <cerrno>
#include <cstring>
#include <string>

#include <fcntl.h>
#include <stdio.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

namespace formats {
namespace {

namespace fs = std::filesystem;
using shard::Code;

constexpr unsigned kExchange = 2;  // RENAME_EXCHANGE

int open_locked(const fs::path& folder) {
  const int fd = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd >= 0 && ::flock(fd, LOCK_EX | LOCK_NB) == 0) return fd;
  if (fd >= 0) ::close(fd);
  return -1;
}

void sync_one(const fs::path& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  const bool done = fd >= 0 && ::fsync(fd) == 0;
  const int error = errno;
  if (fd >= 0) ::close(fd);
  shard::require(done, Code::Io, [&] { return fmt::format("{}: cannot sync: {}", path.string(), std::strerror(error)); });
}

void sync_tree(const fs::path& root) {
  for (const auto& entry : fs::recursive_directory_iterator(root)) sync_one(entry.path());
  sync_one(root);
}

std::string prefix_of(const fs::path& final_path) { return "." + final_path.filename().string() + ".shardkit-"; }

/// Siblings that a killed process left behind: nobody holds their lock.
void remove_leavings(const fs::path& final_path) {
  const auto prefix = prefix_of(final_path);
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(final_path.parent_path(), error)) {
    if (!entry.path().filename().string().starts_with(prefix) || !entry.is_directory(error)) continue;
    const int lock = open_locked(entry.path());
    if (lock < 0) continue;
    fs::remove_all(entry.path(), error);
    ::close(lock);
  }
}

}  // namespace

Publication::Publication(const fs::path& final_path, bool force) : force_(force) {
  final_ = fs::absolute(final_path).lexically_normal();
  if (final_.filename().empty()) final_ = final_.parent_path();
  std::error_code error;
  shard::require(force || !fs::exists(fs::symlink_status(final_, error)), Code::Usage,
                 [&] { return fmt::format("{}: exists; --force replaces it", final_path.string()); });
  fs::create_directories(final_.parent_path(), error);
  shard::require(!error, Code::Io, [&] { return fmt::format("{}: {}", final_.parent_path().string(), error.message()); });
  remove_leavings(final_);
  auto name = (final_.parent_path() / (prefix_of(final_) + "XXXXXX")).string();
  shard::require(::mkdtemp(name.data()) != nullptr, Code::Io, [&] { return fmt::format("{}: {}", name, std::strerror(errno)); });
  staging_ = name;
  lock_ = open_locked(staging_);
  const auto mask = ::umask(0);
  ::umask(mask);
  ::chmod(staging_.c_str(), 0777 & ~mask);
}

Publication::~Publication() {
  std::error_code error;
  if (!committed_) fs::remove_all(staging_, error);
  if (lock_ >= 0) ::close(lock_);
}

void Publication::commit(bool sync) {
  if (sync) sync_tree(staging_);
  if (::renameat2(AT_FDCWD, staging_.c_str(), AT_FDCWD, final_.c_str(), 1 /* RENAME_NOREPLACE */) == 0) {
    committed_ = true;
  } else if (errno == EEXIST && force_) {
    shard::require(::renameat2(AT_FDCWD, staging_.c_str(), AT_FDCWD, final_.c_str(), kExchange) == 0, Code::Io,
                   [&] { return fmt::format("{}: cannot replace: {}", final_.string(), std::strerror(errno)); });
    committed_ = true;
    std::error_code error;
    fs::remove_all(staging_, error);
  } else if (errno == EINVAL || errno == ENOSYS) {  // a file system without the flag
    std::error_code error;
    if (force_) fs::remove_all(final_, error);
    fs::rename(staging_, final_, error);
    shard::require(!error, Code::Io, [&] { return fmt::format("{}: {}", final_.string(), error.message()); });
    committed_ = true;
  } else {
    shard::fail(errno == EEXIST ? Code::Usage : Code::Io, "{}: cannot publish: {}", final_.string(), std::strerror(errno));
  }
  if (sync) sync_one(final_.parent_path());
}

}  // namespace formats
