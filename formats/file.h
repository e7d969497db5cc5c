// Local files: reading ranges of regular files inside one folder, and publishing a folder at once or not at
// all.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <string_view>

namespace formats {

/// What tells whether a file is the one that it was: the inode, its size, and when it was written.
struct FileFacts {
  std::uint64_t device = 0, inode = 0, size = 0;
  std::int64_t written_ns = 0;  ///< since 1970
  bool operator==(const FileFacts&) const = default;
};
/// Of what stands under a name; nothing where nothing does.
std::optional<FileFacts> facts_of(const std::filesystem::path& path);

/// One open regular file, read by range. Owns the descriptor.
class File {
 public:
  /// Opens for reading; NotFound where it is absent, BadFormat where it is no regular file.
  explicit File(const std::filesystem::path& path);
  /// Takes over an open descriptor that has no path; `name` is for messages.
  File(int descriptor, std::string name);
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  ~File();
  std::uint64_t size() const { return facts_.size; }
  int descriptor() const { return fd_; }
  const std::string& name() const { return name_; }
  /// When it was opened.
  const FileFacts& facts() const { return facts_; }
  /// Fills `into` from `offset`; BadFormat where the file ends before, Io where the system fails. Thread
  /// safe.
  void read(std::uint64_t offset, std::span<std::byte> into) const;
  /// Whether it was written to, or became longer or shorter, since it was opened.
  bool changed() const;
  /// The bytes [offset, offset + length) as text.
  std::string text(std::uint64_t offset, std::uint64_t length) const;

 private:
  std::string name_;
  int fd_ = -1;
  FileFacts facts_;
};

/// One file being written by range. Owns the descriptor. Thread safe for disjoint ranges.
class OutFile {
 public:
  /// Creates the file, or opens the one there.
  explicit OutFile(const std::filesystem::path& path);
  OutFile(const OutFile&) = delete;
  OutFile& operator=(const OutFile&) = delete;
  ~OutFile();
  int descriptor() const { return fd_; }
  /// Throws Io, naming the file.
  void write(std::uint64_t offset, std::span<const std::byte> from);
  void resize(std::uint64_t size);
  /// Until the storage has it.
  void sync();

 private:
  std::string name_;
  int fd_ = -1;
};

/// `folder/name` after checking that the name, which came from a stranger, stays inside `folder`: not
/// absolute, no
/// "..", backslash or NUL, no link that leads out, but for those of a Hugging Face cache: from a snapshot to a file among its model's blobs. Throws BadFormat;
/// does not open.
std::filesystem::path inside(const std::filesystem::path& folder, std::string_view name);

/// Absolute, without ".." and a slash at its end, by its text alone: of "link/.." the link's folder.
std::filesystem::path as_written(const std::filesystem::path& path);

/// Whether `path` is `folder` or lies below it, whether they are there or not: links are resolved as far as the paths exist, the rest is taken as text.
bool lies_in(const std::filesystem::path& path, const std::filesystem::path& folder);

/// `…/models--X/blobs` where `folder` is or lies in `…/models--X/snapshots`, with links resolved.
std::optional<std::filesystem::path> cache_blobs(const std::filesystem::path& folder);

/// A small text file whole (at most `cap` bytes, else BadFormat).
std::string read_text(const std::filesystem::path& path, std::uint64_t cap = 256u << 20);

}  // namespace formats
