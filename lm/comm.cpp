// One mutex a group; the data itself is read from the owners' memory between two barriers.
#include "lm/comm.h"

#include <algorithm>
#include <exception>
#include <system_error>
#include <thread>

#include "libshard/error.h"

namespace lm {

void Group::fail() {
  const std::lock_guard lock(mutex_);
  failed_ = true;
  changed_.notify_all();
}

void Group::barrier(std::unique_lock<std::mutex>& lock) {
  const auto mine = round_;
  if (failed_) throw Abandoned();
  if (++arrived_ == size()) {
    arrived_ = 0;
    ++round_;
    changed_.notify_all();
  } else {
    changed_.wait(lock, [&] { return round_ != mine || failed_; });
    if (round_ == mine) throw Abandoned();
  }
}

template <typename Join>
void LocalComm::all_reduce(std::span<float> values, Join&& join) {
  if (size() == 1) return;
  std::unique_lock lock(group_->mutex_);
  group_->slots_[static_cast<std::size_t>(rank_)] = values;
  group_->barrier(lock);
  const auto slots = group_->slots_;
  lock.unlock();
  std::vector<float> out(slots[0].begin(), slots[0].end());
  for (std::size_t r = 1; r < slots.size(); ++r)
    for (std::size_t i = 0; i < out.size(); ++i) out[i] = join(out[i], slots[r][i]);
  lock.lock();
  group_->barrier(lock);
  lock.unlock();
  std::copy(out.begin(), out.end(), values.begin());
}

void LocalComm::all_reduce_sum(std::span<float> values) {
  all_reduce(values, [](float a, float b) { return a + b; });
}
void LocalComm::all_reduce_max(std::span<float> values) {
  all_reduce(values, [](float a, float b) { return std::max(a, b); });
}

void LocalComm::send(int to, Tensor x) {
  const std::lock_guard lock(group_->mutex_);
  group_->mail_[{rank_, to}].push_back(std::move(x));
  group_->changed_.notify_all();
}

void LocalComm::receive(int from, Tensor& into) {
  std::unique_lock lock(group_->mutex_);
  auto& box = group_->mail_[{from, rank_}];
  group_->changed_.wait(lock, [&] { return !box.empty() || group_->failed_; });
  if (box.empty()) throw Abandoned();
  into = std::move(box.front());
  box.pop_front();
}

void run_ranks(int ranks, const std::function<void()>& fail, const std::function<void(int rank)>& body) {
  std::exception_ptr error;
  std::mutex mutex;
  const auto guarded = [&](int rank) {
    try {
      body(rank);
    } catch (const Abandoned&) {
    } catch (...) {
      {
        const std::lock_guard lock(mutex);
        if (!error) error = std::current_exception();
      }
      fail();
    }
  };
  std::vector<std::thread> threads;
  try {
    for (int rank = 1; rank < ranks; ++rank) threads.emplace_back(guarded, rank);
    guarded(0);
  } catch (const std::system_error& failed) {
    {
      const std::lock_guard lock(mutex);
      if (!error) error = std::make_exception_ptr(shard::Error(shard::Code::Io, fmt::format("rank {}: its thread cannot be started: {}", threads.size() + 1, failed.code().message())));
    }
    fail();
  }
  for (auto& thread : threads) thread.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace lm
