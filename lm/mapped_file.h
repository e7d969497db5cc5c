// A file as memory: mapped whole and read-only, so that a weight is its page-cache bytes and nothing is copied.
#pragma once

#include "libshard/checkpoint.h"

#include <atomic>
#include <cstddef>
#include <memory>
#include <span>

namespace lm {

class MappedFile {
 public:
  /// Null where the file cannot be mapped; reading it is then the way.
  static std::shared_ptr<const MappedFile> map(const shard::FileRange& file);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::span<const std::byte> bytes() const;
  /// Whether the file became shorter under the mapping: zeros were seen in its place.
  bool torn() const;
  /// Brings pages that are wanted soon into the system's cache, by touching those that are not there: what MADV_WILLNEED reads lies in
  /// single pages, which take ten times as long to map, now and whenever the file is read again.
  static void bring(std::span<const std::byte> part);
  /// Pages that are not wanted again leave the process; the system keeps them as it likes.
  static void forget(std::span<const std::byte> part);

 private:
  struct Slot;
  explicit MappedFile(Slot& slot, std::shared_ptr<const void> owner) : slot_(slot), owner_(std::move(owner)) {}
  friend bool mend_mapping(void* address) noexcept;
  static Slot* slots();
  Slot& slot_;
  std::shared_ptr<const void> owner_;  ///< keeps the descriptor open, so that its number stays this file's
};

/// For a handler of SIGBUS: puts zeros where a mapped file ended and marks it torn; false where `address` is in none. Async-signal-safe.
bool mend_mapping(void* address) noexcept;

}  // namespace lm
