// Collectives between the ranks of one group, and the ranks that are threads of one process. Sums are taken in rank order, so they repeat.
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

/// One rank's end of a group. Every rank must make the same calls in the same order.
class Comm {
 public:
  virtual ~Comm() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  virtual void all_reduce_sum(std::span<float> host) = 0;
  virtual void all_reduce_max(std::span<float> host) = 0;
  /// Of tensors that the ranks' ops made; sums are f32, kept or rounded to the tensor's type.
  virtual void all_reduce_sum(Tensor& x) = 0;
  virtual void send(int to, Tensor x) = 0;
  /// Waits for it; `into` has its shape.
  virtual void receive(int from, Tensor& into) = 0;
};

/// What the members of a group of threads share.
class Group {
 public:
  explicit Group(int size) : slots_(static_cast<std::size_t>(size)) {}
  int size() const { return static_cast<int>(slots_.size()); }
  /// Every waiting and every later call throws: one rank failed.
  void fail();

 private:
  friend class LocalComm;
  void barrier(std::unique_lock<std::mutex>& lock);
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::span<float>> slots_;
  std::map<std::pair<int, int>, std::deque<Tensor>> mail_;
  int arrived_ = 0;
  std::uint64_t round_ = 0;
  bool failed_ = false;
};

/// Between threads, over the host's memory.
class LocalComm : public Comm {
 public:
  LocalComm(Group& group, int rank) : group_(&group), rank_(rank) {}
  int rank() const override { return rank_; }
  int size() const override { return group_->size(); }
  void all_reduce_sum(std::span<float> host) override;
  void all_reduce_max(std::span<float> host) override;
  void all_reduce_sum(Tensor& x) override { all_reduce_sum(x.values()); }
  void send(int to, Tensor x) override;
  void receive(int from, Tensor& into) override;

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
