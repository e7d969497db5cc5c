// Ranks that were started together (cli/meeting.h), carrying out one conversion together: each writes its part of
// the streams into rank 0's staging folder, and rank 0 publishes once all have done so. Any rank's failure fails all, and nothing is published.
#pragma once

#include "cli/fingerprint.h"
#include "cli/meeting.h"
#include "cli/parts.h"
#include "formats/local_writer.h"
#include "libshard/execute.h"

#include <filesystem>
#include <functional>
#include <optional>
#include <string>

namespace cli {

class Crew {
 public:
  /// Meets the others near `target`, within $SHARDKIT_TIMEOUT seconds (60).
  Crew(const ranks::Launch& launch, const std::filesystem::path& target, bool force, bool quiet);

  /// As Meeting::run.
  int run(const std::function<int()>& body) { return ranks_.run(body); }

  int local_rank() const { return ranks_.local_rank(); }
  Part part() const { return {static_cast<std::size_t>(ranks_.rank()), static_cast<std::size_t>(ranks_.size())}; }
  /// Where all write. The first call makes it.
  const std::filesystem::path& folder();
  /// Throws Mismatch in every rank unless all would do the same.
  void agree(Fingerprint mine, const shard::Plan& whole, formats::LocalWriter& writer);
  /// Publishes once every rank came here. Rank 0 gets true, and a report of all ranks' bytes.
  bool finish(shard::Report& report, formats::LocalWriter& writer, bool sync);
  /// See Publication.
  std::string left_over() const { return staging_ ? staging_->left_over() : std::string(); }

 private:
  std::filesystem::path target_, folder_;
  bool force_;
  std::optional<formats::Publication> staging_;  // rank 0's; outlives the connections, so that nobody writes any more when it is removed
  Meeting ranks_;
};

}  // namespace cli
