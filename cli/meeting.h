// The processes that mpirun, srun, torchrun or a script (by RANK and WORLD_SIZE) started together: met, and failing together.
#pragma once

#include "lm/processes.h"
#include "ranks/rendezvous.h"

#include <chrono>
#include <condition_variable>
#include <filesystem>
#include <functional>
#include <mutex>
#include <string>
#include <thread>

namespace cli {

/// This process's environment.
ranks::Environment environment();

class Meeting : public lm::Processes {
 public:
  /// Meets the others near `near`, within $SHARDKIT_TIMEOUT seconds (60). Unless quiet, a line on stderr says when that takes long.
  Meeting(const ranks::Launch& launch, const std::filesystem::path& near, bool quiet);
  ~Meeting() override;

  /// Body between meeting and leaving: what it throws reaches every rank, and where another rank failed first, that is thrown.
  int run(const std::function<int()>& body);
  /// When another rank fails, beside the stop flag: `end`, from another thread. Where that does not end this rank within `grace` – it may wait in a library
  /// that knows no way out – the process ends with the failure's line and status.
  void on_failure(std::function<void()> end, std::chrono::seconds grace);

  int rank() const override { return launch_.rank; }
  int size() const override { return launch_.size; }
  int local_rank() const { return launch_.local_rank; }
  std::vector<std::string> all_gather(std::string_view mine) override { return ranks_.all_gather(mine); }
  std::string broadcast(std::string_view text) { return ranks_.broadcast(text); }
  /// The last call: all succeeded.
  void finish() { ranks_.finish(); }

 private:
  void end_within(std::chrono::seconds grace);
  ranks::Launch launch_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool left_ = false;
  std::thread watch_;
  ranks::Rendezvous ranks_;                    // ends first: it may still tell of a failure
};

}  // namespace cli
