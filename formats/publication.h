// A folder or file that appears under its final name whole, or not at all.
#pragma once

#include <filesystem>

namespace formats {

/// Writes go to a hidden sibling of the final name; commit() renames. Without it the destructor removes the sibling.
class Publication {
 public:
  /// An existing `final_path` is refused (Usage) unless `force`. Leavings of dead processes beside it are removed.
  Publication(const std::filesystem::path& final_path, bool force);
  Publication(const Publication&) = delete;
  Publication& operator=(const Publication&) = delete;
  ~Publication();
  /// A folder that exists already; write below it.
  const std::filesystem::path& staging() const { return staging_; }
  /// Syncs (unless told not to), renames, and removes what was there before.
  void commit(bool sync);

 private:
  std::filesystem::path final_, staging_;
  int lock_ = -1;
  bool force_, committed_ = false;
};

}  // namespace formats
