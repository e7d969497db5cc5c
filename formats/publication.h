// A folder or file that appears under its final name whole, or not at all.
#pragma once

#include <array>
#include <filesystem>
#include <string>

namespace formats {

/// The beginning of a hidden sibling's name, "." and the file's own name; shortened, with its digest, where that leaves no room for what follows.
std::string sibling_stem(const std::filesystem::path& path);

/// Writes go to a hidden sibling of the final name; commit() renames. Without it the destructor removes the
/// sibling.
class Publication {
 public:
  enum class Kind { Folder, File };
  /// An existing `final_path` is refused (Usage) unless `force`. Leavings of dead processes beside it are
  /// removed; what a dead process had moved out of the way, to put its own there, is put back.
  Publication(const std::filesystem::path& final_path, bool force, Kind kind = Kind::Folder);
  /// Takes over a folder on the same file system that is complete already; without commit() it stays.
  struct Adopted {
    std::filesystem::path folder;
  };
  Publication(Adopted adopted, const std::filesystem::path& final_path, bool force);
  /// Puts back what a process that died had moved out of the way of `final_path`. Others than Publication's own need it before they look there.
  static void restore(const std::filesystem::path& final_path);
  Publication(const Publication&) = delete;
  Publication& operator=(const Publication&) = delete;
  ~Publication();
  /// Exists already: a folder to write below, or an empty file to write.
  const std::filesystem::path& staging() const { return staging_; }
  /// Syncs (unless told not to), renames, and removes what was there before.
  void commit(bool sync);
  /// After commit(): where the rest of what was there before still lies, because it could not be removed; "" where none does.
  const std::string& left_over() const { return left_over_; }

 private:
  void stage(Kind kind);
  void replace();
  void remove_old(const std::filesystem::path& old);
  void let_go();

  std::filesystem::path final_, staging_;
  std::filesystem::path complete_;  ///< what gets the final name: the staging folder, or the adopted one
  std::string left_over_;
  int lock_ = -1;
  std::array<int, 4> spare_{-1, -1, -1, -1};  ///< descriptors that removing folders in folders needs, where the process has no more
  bool force_, adopted_ = false, committed_ = false;
};

}  // namespace formats
