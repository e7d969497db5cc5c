// Streams that are ranges of local files: the reader that every format here shares.
#pragma once

#include "formats/file.h"
#include "libshard/checkpoint.h"

#include <map>
#include <memory>
#include <mutex>
#include <vector>

namespace formats {

/// Bytes that no file holds as they are read: decompressed chunks, dequantised or merged weights.
struct ComputedBytes {
  virtual ~ComputedBytes() = default;
  /// Thread safe. Throws as a file's read would.
  virtual void read(std::uint64_t offset, std::span<std::byte> into) const = 0;
  /// What they are computed from, where it is that.
  virtual const shard::ScaledMatrix* scaled_matrix() const { return nullptr; }
};

/// Open files by index, the least recently opened closed first when there are too many. All are read as they were when the pool was made: where one
/// is another by the time it is opened, or closed, Io is thrown. Thread safe.
class FilePool {
 public:
  explicit FilePool(std::vector<std::filesystem::path> paths);
  std::shared_ptr<const File> get(std::uint32_t file) const;
  /// A file that is open already and has no path to be opened by again.
  std::uint32_t add(std::shared_ptr<const File> file);
  /// Bytes that are computed when asked for; a stream names their index as its file.
  std::uint32_t add(std::shared_ptr<const ComputedBytes> bytes);
  const ComputedBytes* computed(std::uint32_t file) const;
  /// Files of another pool that computed bytes are read from.
  void also(std::shared_ptr<const FilePool> other) { others_.push_back(std::move(other)); }
  /// Throws Io where a file was written to or replaced since the pool was made: what was read may be half old, half new.
  void refuse_changed() const;

 private:
  mutable std::mutex mutex_;
  mutable std::vector<std::shared_ptr<const File>> open_;
  mutable std::vector<std::uint32_t> order_;  ///< those that may be closed
  std::vector<std::filesystem::path> paths_;
  std::vector<std::optional<FileFacts>> facts_;  ///< by path, of those that were there
  std::vector<std::shared_ptr<const FilePool>> others_;
  std::map<std::uint32_t, std::shared_ptr<const ComputedBytes>> computed_;  ///< complete before the first read
};

class LocalReader final : public shard::Reader {
 public:
  /// `described` speaks of `files` by index.
  LocalReader(shard::ShardedStateDict described, std::shared_ptr<const FilePool> files)
      : described_(std::move(described)), files_(std::move(files)) {}
  const shard::ShardedStateDict& describe() const override { return described_; }
  void read(std::uint32_t stream, std::uint64_t offset, std::span<std::byte> into) const override;
  std::optional<shard::FileRange> file_range(std::uint32_t stream) const override;
  const shard::ScaledMatrix* scaled_matrix(std::uint32_t stream) const override;

 private:
  shard::ShardedStateDict described_;
  std::shared_ptr<const FilePool> files_;
};

/// Whether `bytes` from two places on, as one run each, are the same.
bool same_bytes(const shard::Reader& reader, const shard::Place& a, const shard::Place& b, std::uint64_t bytes);
struct FileOffset {
  std::uint32_t file;
  std::uint64_t offset;
};
bool same_bytes(const FilePool& files, const FileOffset& a, const FileOffset& b, std::uint64_t bytes);

}  // namespace formats
