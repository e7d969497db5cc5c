// The inputs of a step on their way from the host: written once to pinned memory, from where a kernel takes them to their places. Nobody waits,
// and the caller's memory is its own again at once.
#pragma once

#include "gpu/runtime.h"
#include "lm/tensor.h"

#include <vector>

namespace gpu {

/// What a step reads, in device memory.
struct StepInputs {
  lm::Tensor hidden;
  lm::Ids ids, positions;
};

/// For one stream.
class StepUploads {
 public:
  using Index = lm::Index;
  StepUploads() = default;
  /// Waits until all is read.
  ~StepUploads();
  StepUploads(const StepUploads&) = delete;
  StepUploads& operator=(const StepUploads&) = delete;
  /// Two steps may be under way; the third waits for the first.
  void send(const lm::Tensor& hidden, const std::vector<Index>& ids, const std::vector<Index>& positions, const StepInputs& to, StreamView on);
  /// After every send(), once the work behind it is given.
  void sent(StreamView on) { slots_[turn_].read.record(on); }

 private:
  struct Slot {
    PinnedBuffer memory;
    Event read;
  };
  Slot slots_[2];
  std::size_t turn_ = 0;
};

}  // namespace gpu
