// A folder of files being written: streams at their places, archives around them, published at once or not at all.
#pragma once

#include "formats/local.h"
#include "formats/publication.h"
#include "formats/torch_save.h"

#include <atomic>
#include <functional>
#include <map>
#include <mutex>
#include <optional>

namespace formats {

/// Files of one target, written by range below a staging folder. Few are open at a time. Thread safe.
class OutputFolder {
 public:
  /// A target at `path`; see Publication.
  OutputFolder(const std::filesystem::path& path, bool force) : publication_(std::in_place, path, force), root_(publication_->staging()) {}
  /// A folder that several processes write together; commit() leaves its name to them.
  explicit OutputFolder(const std::filesystem::path& joint) : root_(joint) {}
  std::uint32_t add(const std::string& name);  ///< a file below the folder; its folders are made
  void write(std::uint32_t file, std::uint64_t offset, std::span<const std::byte> from);
  void write(std::uint32_t file, std::uint64_t offset, std::string_view from);
  void read(std::uint32_t file, std::uint64_t offset, std::span<std::byte> into) const;
  void resize(std::uint32_t file, std::uint64_t size);
  shard::FileRange range(std::uint32_t file, std::uint64_t offset);
  const std::vector<std::string>& names() const { return names_; }
  /// Where a library may create the file that add() named.
  std::filesystem::path path(std::uint32_t file) const { return root_ / names_[file]; }
  /// Closes what is open; `sync` has the system store it, so that other machines see it too.
  void flush(bool sync);
  void commit(bool sync);
  /// See Publication.
  std::string left_over() const { return publication_ ? publication_->left_over() : std::string(); }

 private:
  std::shared_ptr<OutFile> open(std::uint32_t file) const;

  std::optional<Publication> publication_;
  std::filesystem::path root_;
  std::vector<std::string> names_;
  mutable std::mutex mutex_;
  mutable std::vector<std::shared_ptr<OutFile>> open_;
  mutable std::vector<std::uint32_t> order_;
};

/// A stream that is no range of a file: its bytes are packed before they are stored. Thread safe for disjoint ranges.
struct StreamSink {
  virtual ~StreamSink() = default;
  virtual void write(std::uint64_t offset, std::span<const std::byte> from) = 0;
};

/// The writer behind every format whose streams are file ranges. The format adds files, streams and archives, then
/// describes the tensors; the executor writes; commit() closes the archives with their sums.
class LocalWriter final : public shard::Writer {
 public:
  LocalWriter(const std::filesystem::path& path, bool force) : folder_(path, force) {}
  explicit LocalWriter(const std::filesystem::path& joint) : folder_(joint) {}

  OutputFolder& folder() { return folder_; }
  shard::ShardedStateDict& described() { return described_; }
  /// A stream that is a range of a file.
  std::uint32_t add_stream(std::uint32_t file, std::uint64_t offset, std::uint64_t size, bool summed);
  std::uint32_t add_stream(std::shared_ptr<StreamSink> sink, std::uint64_t size);
  /// Bytes that sinks stored so far, where they pack what they are given.
  void count_packed(std::shared_ptr<const std::atomic<std::uint64_t>> bytes) { packed_ = std::move(bytes); }
  std::optional<std::uint64_t> packed_bytes() const { return packed_ ? std::optional(packed_->load()) : std::nullopt; }
  /// Called by commit() once every byte is written, before anything is published.
  void before_commit(std::function<void()> finish) { finish_ = std::move(finish); }
  /// A torch.save archive at `base` of a file; small records are written at once. Returns its size; the streams of its
  /// storages are first_stream, first_stream + 1 …
  struct Added {
    std::uint64_t size;
    std::uint32_t first_stream;
  };
  Added add_archive(std::uint32_t file, std::uint64_t base, std::string root, std::string_view pickle,
                    std::span<const std::uint64_t> storages);

  const shard::ShardedStateDict& describe() const override { return described_; }
  void write(std::uint32_t stream, std::uint64_t offset, std::span<const std::byte> from) override;
  void read(std::uint32_t stream, std::uint64_t offset, std::span<std::byte> into) const override;
  std::optional<shard::FileRange> file_range(std::uint32_t stream) override;
  void commit(std::span<const std::optional<std::uint32_t>> crc32, bool sync) override;

 private:
  struct Archive {
    std::uint32_t file;
    std::uint64_t base;
    std::uint32_t first_stream;
    std::vector<std::uint32_t> small_crcs;  ///< by entry; storages hold 0
    std::size_t first_storage, storages;
    ZipLayout zip;
  };
  OutputFolder folder_;
  shard::ShardedStateDict described_;
  std::vector<Archive> archives_;
  std::map<std::uint32_t, std::shared_ptr<StreamSink>> sinks_;  ///< by stream
  std::function<void()> finish_;
  std::shared_ptr<const std::atomic<std::uint64_t>> packed_;
};

}  // namespace formats
