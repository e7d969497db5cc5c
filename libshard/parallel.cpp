// A fixed set of workers over an array of claimed flags; nothing to tune.
#include "libshard/parallel.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace shard {

void run_tasks(std::size_t count, unsigned threads, const std::function<void(std::size_t, unsigned)>& task) {
  threads = static_cast<unsigned>(std::clamp<std::size_t>(threads, 1, std::max<std::size_t>(count, 1)));
  std::vector<std::atomic<bool>> claimed(count);
  std::atomic<bool> failed = false;
  std::exception_ptr error;
  std::mutex mutex;
  const auto work = [&](unsigned worker) {
    try {
      const auto start = count * worker / threads;
      for (std::size_t i = 0; i < count && !failed; ++i) {
        const auto at = (start + i) % count;
        if (!claimed[at].exchange(true)) task(at, worker);
      }
    } catch (...) {
      const std::lock_guard lock(mutex);
      if (!failed.exchange(true)) error = std::current_exception();
    }
  };
  std::vector<std::thread> others;
  try {
    for (unsigned worker = 1; worker < threads; ++worker) others.emplace_back(work, worker);
  } catch (const std::exception&) {  // the system gives no more: those that run do all of it
  }
  work(0);
  for (auto& thread : others) thread.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace shard
