// System calls on files, with every failure as one sentence that names the file.
#include "formats/file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "libshard/error.h"

namespace formats {
namespace {

namespace fs = std::filesystem;
using shard::Code;

[[noreturn]] void fail_with_errno(const std::string& name, const char* doing) {
  shard::fail(errno == ENOENT ? Code::NotFound : Code::Io, "{}: {}: {}", name, doing, std::strerror(errno));
}

FileFacts facts_in(const struct stat& info) {
  return {static_cast<std::uint64_t>(info.st_dev), static_cast<std::uint64_t>(info.st_ino), static_cast<std::uint64_t>(info.st_size), std::int64_t{info.st_mtim.tv_sec} * 1'000'000'000 + info.st_mtim.tv_nsec};
}

FileFacts regular_file(int fd, const std::string& name) {
  struct stat info {};
  if (fstat(fd, &info) != 0) fail_with_errno(name, "cannot stat");
  shard::require(S_ISREG(info.st_mode), Code::BadFormat,
                 [&] { return fmt::format("{}: is no regular file", name); });
  return facts_in(info);
}

/// Absolute and with links resolved; "" where that cannot be.
fs::path resolved(const fs::path& path) {
  std::error_code error;
  const auto out = fs::weakly_canonical(path.empty() ? fs::current_path(error) : fs::absolute(path, error), error);
  return out.has_filename() || !out.has_relative_path() ? out : out.parent_path();  // "out/" that is not there keeps its slash
}

}  // namespace

std::optional<FileFacts> facts_of(const fs::path& path) {
  struct stat info {};
  if (::stat(path.c_str(), &info) != 0) return std::nullopt;
  return facts_in(info);
}

File::File(const fs::path& path) : name_(path.string()) {
  fd_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a FIFO must not hang the program
  if (fd_ < 0 && errno == ELOOP) shard::fail(Code::BadFormat, "{}: links go in a circle", name_);
  if (fd_ < 0) fail_with_errno(name_, "cannot open");
  try {
    facts_ = regular_file(fd_, name_);
  } catch (...) {
    ::close(fd_);
    throw;
  }
}

File::File(int descriptor, std::string name) : name_(std::move(name)), fd_(descriptor) {
  facts_ = regular_file(fd_, name_);
}

bool File::changed() const { return regular_file(fd_, name_) != facts_; }

File::~File() {
  if (fd_ >= 0) ::close(fd_);
}

void File::read(std::uint64_t offset, std::span<std::byte> into) const {
  while (!into.empty()) {
    const auto n =
        ::pread(fd_, into.data(), std::min<std::size_t>(into.size(), 1 << 30), static_cast<off_t>(offset));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail_with_errno(name_, "cannot read");
    shard::require(n > 0, Code::BadFormat, [&] {
      return fmt::format("{}: ends at byte {}; {} more were expected", name_, offset, into.size());
    });
    offset += static_cast<std::uint64_t>(n);
    into = into.subspan(static_cast<std::size_t>(n));
  }
}

std::string File::text(std::uint64_t offset, std::uint64_t length) const {
  shard::require(offset <= size() && length <= size() - offset, Code::BadFormat,
                 [&] { return fmt::format("{}: bytes {}+{} reach past its end", name_, offset, length); });
  std::string out(length, '\0');
  read(offset, std::as_writable_bytes(std::span(out.data(), out.size())));
  return out;
}

OutFile::OutFile(const fs::path& path) : name_(path.string()) {
  fd_ = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
  if (fd_ < 0) shard::fail(Code::Io, "{}: cannot create: {}", name_, std::strerror(errno));
}

OutFile::~OutFile() {
  if (fd_ >= 0) ::close(fd_);
}

void OutFile::write(std::uint64_t offset, std::span<const std::byte> from) {
  while (!from.empty()) {
    const auto n =
        ::pwrite(fd_, from.data(), std::min<std::size_t>(from.size(), 1 << 30), static_cast<off_t>(offset));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) shard::fail(Code::Io, "{}: cannot write: {}", name_, std::strerror(n == 0 ? ENOSPC : errno));
    offset += static_cast<std::uint64_t>(n);
    from = from.subspan(static_cast<std::size_t>(n));
  }
}

void OutFile::resize(std::uint64_t size) {
  if (::ftruncate(fd_, static_cast<off_t>(size)) != 0)
    shard::fail(Code::Io, "{}: cannot resize: {}", name_, std::strerror(errno));
}

void OutFile::sync() {
  if (::fsync(fd_) != 0) shard::fail(Code::Io, "{}: cannot sync: {}", name_, std::strerror(errno));
}

fs::path inside(const fs::path& folder, std::string_view name) {
  const auto refuse = [&](const char* why) {
    shard::fail(Code::BadFormat, "{}: the name '{}' {}", folder.string(), name, why);
  };
  if (name.empty()) refuse("is empty");
  if (name.front() == '/') refuse("is absolute; should lie inside the checkpoint");
  if (name.find('\\') != name.npos || name.find('\0') != name.npos)
    refuse("holds a character that no file here has");
  for (const auto& part : fs::path(name))
    if (part == ".." || part == ".") refuse("leaves the folder; should lie inside the checkpoint");
  const auto path = folder / name;
  std::error_code error;
  const auto real = fs::weakly_canonical(path, error);
  if (error == std::errc::too_many_symbolic_link_levels) refuse("is a link that goes in a circle");
  if (error) shard::fail(Code::Io, "{}: cannot resolve: {}", path.string(), error.message());
  if (!lies_in(real, folder) && real.parent_path() != cache_blobs(folder)) refuse("is a link that leads out of the checkpoint");
  return path;
}

fs::path as_written(const fs::path& path) {
  const auto out = fs::absolute(path).lexically_normal();
  return out.has_filename() ? out : out.parent_path();
}

bool lies_in(const fs::path& path, const fs::path& folder) {
  const auto home = resolved(folder), real = resolved(path);
  return !home.empty() && std::mismatch(home.begin(), home.end(), real.begin(), real.end()).first == home.end();
}

std::optional<fs::path> cache_blobs(const fs::path& folder) {
  for (auto at = resolved(folder); at.has_relative_path(); at = at.parent_path())
    if (const auto model = at.parent_path(); at.filename() == "snapshots" && model.filename().string().starts_with("models--")) return model / "blobs";
  return std::nullopt;
}

std::string read_text(const fs::path& path, std::uint64_t cap) {
  const File file(path);
  shard::require(file.size() <= cap, Code::BadFormat, [&] {
    return fmt::format("{}: {} bytes; at most {} make sense", path.string(), file.size(), cap);
  });
  return file.text(0, file.size());
}

}  // namespace formats
