// A folder or file that appears under its final name whole, or not at all.
#pragma once

#include <filesystem>

namespace formats {

/// Writes go to a hidden sibling of the final name; commit() renames. Without it the destructor removes the
/// sibling.
class Publication {
 public:
  enum class Kind { Folder, File };
  /// An existing `final_path` is refused (Usage) unless `force`. Leavings of dead processes beside it are
  /// removed.
  Publication(const std::filesystem::path& final_path, bool force, Kind kind = Kind::Folder);
  /// Takes over a folder on the same file system that is complete already.
  struct Adopted {
    std::filesystem::path folder;
  };
  Publication(Adopted adopted, const std::filesystem::path& final_path, bool force);
  Publication(const Publication&) = delete;
  Publication& operator=(const Publication&) = delete;
  ~Publication();
  /// Exists already: a folder to write below, or an empty file to write.
  const std::filesystem::path& staging() const { return staging_; }
  /// Syncs (unless told not to), renames, and removes what was there before.
  void commit(bool sync);

 private:
  void stage(Kind kind);
  void replace();

  std::filesystem::path final_, staging_;
  int lock_ = -1;
  bool force_, committed_ = false;
};

}  // namespace formats
