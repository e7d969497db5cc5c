// Several processes that carry out one conversion together, on storage that they share.
#pragma once

#include "cli/fingerprint.h"
#include "formats/local_writer.h"
#include "libshard/execute.h"

#include <nlohmann/json.hpp>

#include <filesystem>
#include <optional>
#include <span>
#include <string>

namespace cli {

/// "2/4": the second of four.
struct Part {
  std::size_t index, count;
};
/// Throws Usage.
Part parse_part(const std::string& text);

/// What the parts of one conversion share: a folder beside the target, with the file `conversion.json` that says of which conversion
/// it is, `files`, which becomes the target, `joined`, with a file for each part that writes or may yet, and `sums`, with one for each that is done.
class JointFolder {
 public:
  /// Made by whichever part comes first. Throws Mismatch where it is of another conversion, Usage where `target` exists without `force`.
  JointFolder(const std::filesystem::path& target, const Part& part, Fingerprint mine, bool force);
  JointFolder(const JointFolder&) = delete;
  JointFolder& operator=(const JointFolder&) = delete;
  ~JointFolder();
  /// The conversion can be done. Where it cannot, and no other part has joined, the folder is removed.
  void begin() { begun_ = true; }
  /// Where all write.
  std::filesystem::path files() const { return folder_ / "files"; }
  /// Leaves this part's sums. The process that finds every part done closes the archives, gives the files their final name, and gets
  /// true. Throws Mismatch where the folder is another one by now, or a part did something else.
  bool finish(const shard::Plan& whole, const shard::Report& report, formats::LocalWriter& writer, bool sync);
  /// See Publication.
  const std::string& left_over() const { return left_over_; }

 private:
  void publish(const std::filesystem::path& sums, const std::string& plan, const shard::Report& report, formats::LocalWriter& writer, bool sync);

  std::filesystem::path target_, folder_;
  Part part_;
  bool force_, begun_ = false;
  std::string left_over_;
  std::string entry_;   ///< of this process, among those that joined
  std::string number_;  ///< of the conversion, by chance: one begun anew has another
};

/// Removes what parts that never ended left beside `target`, which somebody else has published now. Only what a JointFolder made.
void remove_abandoned_parts(const std::filesystem::path& target);

/// A part's sums, as pairs of stream and sum; and the sums of all streams from those of all parts and what `report` holds.
nlohmann::json sums_of(const shard::Report& report);
std::vector<std::optional<std::uint32_t>> join_sums(std::span<const nlohmann::json> parts, const shard::Report& report, const formats::LocalWriter& writer);

}  // namespace cli
