// One validation at a time, the others wait in a short line; each can be cut short.
#pragma once

#include "cli/serve/history.h"
#include "cli/serve/metrics.h"
#include "cli/validate.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>

namespace cli {

/// Why a job is to end early.
enum class Cut { No, Timeout, ClientGone, Shutdown };

struct Job {
  ValidateAsk ask;
  std::string shown, origin;                 ///< as Record::checkpoint and Record::origin
  std::optional<std::chrono::steady_clock::time_point> deadline;
  std::optional<Watched> watched;
  std::function<void(const Record&)> done;   ///< called exactly once for a job that was taken, on any thread; `id` is 0 where it never began
  std::atomic<bool> stop = false;            ///< the Budget's flag
  std::atomic<Cut> why = Cut::No;
  void cut(Cut reason);
};

class Queue {
 public:
  /// `after` sees every validation that ran, once its row is written (for --on-bad).
  Queue(std::size_t longest, shard::Budget budget, std::unique_ptr<lm::Device> device, History& history, Metrics& metrics, std::function<void(const Record&)> after);
  ~Queue();
  /// False where the line is full or closed: the job is not taken.
  bool push(std::shared_ptr<Job> job);
  /// Cuts jobs whose deadline has passed; those in the line that were cut leave it. To be called now and then.
  void tick();
  /// Takes no more, cuts all.
  void close();
  /// Whether the worker came to its end in that time after close().
  bool wait(std::chrono::milliseconds most);
  std::size_t length() const;
  bool running() const;

 private:
  void work();
  Record run(Job& job);
  const std::size_t longest_;
  const shard::Budget budget_;
  const std::unique_ptr<lm::Device> device_;  // the worker's
  History& history_;
  Metrics& metrics_;
  const std::function<void(const Record&)> after_;
  mutable std::mutex mutex_;
  std::condition_variable wake_, ended_;
  std::deque<std::shared_ptr<Job>> line_;
  std::shared_ptr<Job> current_;
  bool closed_ = false, worker_ended_ = false;
  std::thread worker_;
};

}  // namespace cli
