// Writing a checkpoint's streams so that those that record a CRC-32 are summed as they go.
#pragma once

#include "libshard/checkpoint.h"
#include "libshard/execute.h"
#include "libshard/sums.h"

#include <atomic>
#include <span>
#include <vector>

namespace shard {

/// Thread safe for disjoint ranges.
class SummedTarget {
 public:
  SummedTarget(Writer& to, const Kernels& kernels) : to_(to), kernels_(kernels), streams_(to.describe().streams), sums_(streams_.size()) {}

  bool summed(std::uint32_t stream) const { return streams_[stream].summed; }
  const Stream& stream(std::uint32_t stream) const { return streams_[stream]; }
  void write(std::uint32_t stream, std::uint64_t offset, std::span<const std::byte> from) {
    to_.write(stream, offset, from);
    written_ += from.size();
  }
  /// For bytes that got there another way.
  void add_written(std::uint64_t bytes) { written_ += bytes; }
  void add_sum(std::uint32_t stream, std::uint64_t offset, std::uint64_t length, std::uint32_t crc) { sums_[stream].add(offset, length, crc, kernels_.combine); }
  /// The sums of all streams that ask for one (of a partial plan: that it writes); what no pass summed is read once more.
  std::vector<std::optional<std::uint32_t>> finish(const Plan& plan, unsigned threads);

  std::uint64_t bytes_written() const { return written_; }
  Writer& writer() { return to_; }

 private:
  Writer& to_;
  const Kernels& kernels_;
  const std::vector<Stream>& streams_;
  std::vector<StreamSum> sums_;
  std::atomic<std::uint64_t> written_ = 0;
};

}  // namespace shard
