// Which checkpoints of a watched folder are complete and new.
#pragma once

#include "cli/serve/history.h"
#include "cli/serve/queue.h"

#include <chrono>
#include <condition_variable>
#include <filesystem>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

namespace cli {

/// A folder that could be validated, and its content as sizes, times and inodes.
struct Candidate {
  std::filesystem::path path;
  std::string stamp;
  bool tracked = false;  ///< a tracker says that it is complete
};

/// What lies complete in `folder` and in its direct subfolders: iterations that a Megatron tracker names or has passed; other
/// checkpoint folders (a Hugging Face folder, .metadata). An `iter_*` folder without a tracker is never complete. Links and
/// hidden folders are left out.
std::vector<Candidate> candidates(const std::filesystem::path& folder);

/// Polls, and hands over each complete checkpoint once, when nothing in it changed for two polls (four where no tracker
/// speaks for it, and only if it then opens cleanly).
class Watch {
 public:
  /// `submit` returns false where the line is full; it is asked again later.
  Watch(std::filesystem::path folder, std::chrono::milliseconds every, History& history, std::function<bool(const Candidate&)> submit);
  ~Watch();
  void start();
  /// The validation of that path has ended, or it left the line.
  void ended(const std::filesystem::path& path);
  /// Takes no more; whether the thread came to its end in that time. One that is stuck in a read cannot be joined.
  bool stop(std::chrono::milliseconds most);

 private:
  void work();
  void poll();
  const std::filesystem::path folder_;
  const std::chrono::milliseconds every_;
  History& history_;
  const std::function<bool(const Candidate&)> submit_;
  struct Seen {
    std::string stamp;
    int polls = 0;
    bool refused = false;  ///< did not open in this state
  };
  std::map<std::string, Seen> seen_;
  std::mutex mutex_;
  std::set<std::string> under_way_;
  std::condition_variable wake_, over_;
  bool quit_ = false, work_ended_ = false;
  std::thread thread_;
};

}  // namespace cli
