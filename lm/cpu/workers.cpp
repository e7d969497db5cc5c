// A condition variable wakes the helpers; tasks are claimed by a counter.
#include "lm/cpu/workers.h"

#include "libshard/stop.h"

#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace lm::cpu {
namespace {

class Helpers {
 public:
  ~Helpers() {
    {
      const std::lock_guard lock(mutex_);
      quit_ = true;
      wake_.notify_all();
    }
    for (auto& thread : threads_) thread.join();
  }

  void run(std::size_t count, unsigned threads, const std::function<void(std::size_t)>& task, const std::atomic<bool>* stop) {
    auto helpers = static_cast<unsigned>(count < threads ? count : threads) - 1;
    try {
      while (threads_.size() < helpers) threads_.emplace_back([this, mine = threads_.size()] { serve(mine); });
    } catch (const std::exception&) {  // the system gives no more: those that run do all of it
      helpers = static_cast<unsigned>(threads_.size());
    }
    {
      const std::lock_guard lock(mutex_);
      task_ = &task;
      stop_ = stop;
      count_ = count;
      next_ = 0;
      wanted_ = helpers;
      busy_ = helpers;
      error_ = nullptr;
      ++round_;
      wake_.notify_all();
    }
    work();
    std::unique_lock lock(mutex_);
    idle_.wait(lock, [&] { return busy_ == 0; });
    if (error_) std::rethrow_exception(error_);
  }

 private:
  void work() {
    try {
      for (std::size_t i; (i = next_.fetch_add(1)) < count_;) {
        shard::refuse_stopped(stop_);
        (*task_)(i);
      }
    } catch (...) {
      next_ = count_;
      const std::lock_guard lock(mutex_);
      if (!error_) error_ = std::current_exception();
    }
  }
  void serve(std::size_t mine) {
    std::uint64_t seen = 0;
    std::unique_lock lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return quit_ || (round_ != seen && mine < wanted_); });
      if (quit_) return;
      seen = round_;
      lock.unlock();
      work();
      lock.lock();
      if (--busy_ == 0) idle_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, idle_;
  std::vector<std::thread> threads_;
  const std::function<void(std::size_t)>* task_ = nullptr;
  const std::atomic<bool>* stop_ = nullptr;
  std::size_t count_ = 0;
  std::atomic<std::size_t> next_ = 0;
  unsigned wanted_ = 0, busy_ = 0;
  std::uint64_t round_ = 0;
  bool quit_ = false;
  std::exception_ptr error_;
};

}  // namespace

void run_on_workers(std::size_t count, unsigned threads, const std::function<void(std::size_t)>& task, const std::atomic<bool>* stop) {
  if (count == 0) return;
  if (threads <= 1 || count == 1) {
    for (std::size_t i = 0; i < count; ++i) {
      shard::refuse_stopped(stop);
      task(i);
    }
    return;
  }
  thread_local Helpers helpers;
  helpers.run(count, threads, task, stop);
}

}  // namespace lm::cpu
