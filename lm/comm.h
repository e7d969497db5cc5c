// Ranks that are threads of one process, and the collectives between them. Sums are taken in rank order, so they repeat.
#pragma once

#include "lm/tensor.h"

#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <span>
#include <vector>

namespace lm {

/// What the members of one group share.
class Group {
 public:
  explicit Group(int size) : slots_(static_cast<std::size_t>(size)) {}
  int size() const { return static_cast<int>(slots_.size()); }
  /// Every waiting and every later call throws: one rank failed.
  void fail();

 private:
  friend class Comm;
  void barrier(std::unique_lock<std::mutex>& lock);
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::span<float>> slots_;
  std::map<std::pair<int, int>, std::deque<Tensor>> mail_;
  int arrived_ = 0;
  std::uint64_t round_ = 0;
  bool failed_ = false;
};

/// One rank's end of a group. Every rank must make the same calls in the same order.
class Comm {
 public:
  Comm(Group& group, int rank) : group_(&group), rank_(rank) {}
  int rank() const { return rank_; }
  int size() const { return group_->size(); }
  void all_reduce_sum(std::span<float> values);
  void all_reduce_max(std::span<float> values);
  void send(int to, Tensor tensor);
  /// Waits for it.
  Tensor receive(int from);

 private:
  template <typename Join>
  void all_reduce(std::span<float> values, Join&& join);
  Group* group_;
  int rank_;
};

/// Thrown in ranks that wait for one that failed; the failed one's own error is the one to report.
struct Abandoned {};

/// Runs body(rank) on `ranks` threads and throws the first error that is not Abandoned; an error calls `fail` first.
void run_ranks(int ranks, const std::function<void()>& fail, const std::function<void(int rank)>& body);

}  // namespace lm
