// A copy by the driver would take longer to start than the kernel, whose own reads cross the bus, takes as a whole.
#include "gpu/model/step_inputs.h"

#include "gpu/ops/rows.h"
#include "libshard/error.h"

#include <cstring>
#include <utility>

namespace gpu {

StepUploads::~StepUploads() {
  try {
    for (const auto& slot : slots_) slot.read.wait();
  } catch (...) {  // told by the next call on the stream
  }
}

void StepUploads::send(const lm::Tensor& hidden, const std::vector<Index>& ids, const std::vector<Index>& positions, const StepInputs& to, StreamView on) {
  shard::require(to.hidden.rows() == hidden.rows() && to.hidden.columns() == hidden.columns() && to.ids.host.size() == ids.size() && to.positions.host.size() == positions.size(),
                 shard::Code::Device, [&] { return fmt::format("device: a step's inputs [{}, {}] have places for [{}, {}]", hidden.rows(), hidden.columns(), to.hidden.rows(), to.hidden.columns()); });
  auto& slot = slots_[turn_ = 1 - turn_];
  slot.read.wait();
  const auto values = hidden.values();
  const auto bytes = values.size_bytes() + (ids.size() + positions.size()) * sizeof(Index);
  if (slot.memory.size() < bytes) slot.memory = PinnedBuffer(bytes);
  auto* at = slot.memory.data();
  const auto put = [&](const auto& part) {
    std::memcpy(at, part.data(), part.size() * sizeof(part[0]));
    return std::exchange(at, at + part.size() * sizeof(part[0]));
  };
  const auto numbers = [&](const std::vector<Index>& from, const lm::Ids& into) {
    return RowNumbers{reinterpret_cast<std::int64_t*>(put(from)), reinterpret_cast<std::int64_t*>(into.device.get()), static_cast<Index>(from.size())};
  };
  const auto first = numbers(ids, to.ids), second = numbers(positions, to.positions);  // before the values: aligned to eight bytes
  const View from{put(values), shard::DType::F32, hidden.rows(), hidden.columns(), hidden.columns()};
  take_inputs(on, {to.hidden.data(), to.hidden.dtype(), hidden.rows(), hidden.columns(), hidden.columns()}, from, first, second);
}

}  // namespace gpu
