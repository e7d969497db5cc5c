// Ranks that mpirun, srun or torchrun started (or a script, by RANK and WORLD_SIZE), carrying out one conversion together: each writes its part of
// the streams into rank 0's staging folder, and rank 0 publishes once all have done so. Any rank's failure fails all, and nothing is published.
#pragma once

#include "formats/local_writer.h"
#include "cli/parts.h"
#include "libshard/execute.h"
#include "ranks/rendezvous.h"

#include <filesystem>
#include <functional>
#include <optional>
#include <string>

namespace cli {

/// This process's environment.
ranks::Environment environment();

class Crew {
 public:
  /// Meets the others near `target`, within $SHARDKIT_TIMEOUT seconds (60).
  Crew(const ranks::Launch& launch, const std::filesystem::path& target, bool force);

  /// Body between meeting and leaving: what it throws reaches every rank, and where another rank failed first, that is thrown.
  int run(const std::function<int()>& body);

  int local_rank() const { return launch_.local_rank; }
  Part part() const { return {static_cast<std::size_t>(launch_.rank), static_cast<std::size_t>(launch_.size)}; }
  /// Where all write. The first call makes it.
  const std::filesystem::path& folder();
  /// Throws Mismatch in every rank unless all would do the same.
  void agree(const shard::Plan& whole, formats::LocalWriter& writer);
  /// Publishes once every rank came here. Rank 0 gets true, and a report of all ranks' bytes.
  bool finish(shard::Report& report, formats::LocalWriter& writer, bool sync);

 private:
  ranks::Launch launch_;
  std::filesystem::path target_, folder_;
  bool force_;
  std::optional<formats::Publication> staging_;  // rank 0's; outlives the connections, so that nobody writes any more when it is removed
  ranks::Rendezvous ranks_;
};

}  // namespace cli
