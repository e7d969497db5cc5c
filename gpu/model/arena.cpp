// Sizes are rounded up so that passes of one shape find each other's blocks.
#include "gpu/model/arena.h"

#include "libshard/error.h"

#include <algorithm>

namespace gpu {

std::shared_ptr<std::byte> Arena::take(std::size_t bytes) const {
  constexpr std::size_t kStep = 64 << 10;
  const auto size = (std::max<std::size_t>(bytes, 1) + kStep - 1) / kStep * kStep;
  DeviceBuffer block;
  {
    const std::lock_guard lock(state_->mutex);
    // A block twice as large as asked for is better kept for what needs it.
    if (const auto found = state_->free.lower_bound(size); found != state_->free.end() && found->first <= 2 * size) {
      block = std::move(found->second);
      state_->free.erase(found);
    }
  }
  if (!block) {
    try {
      block = DeviceBuffer(size);
    } catch (const shard::Error&) {
      // What lies idle may be what is missing.
      const std::lock_guard lock(state_->mutex);
      if (state_->free.empty()) throw;
      for (const auto& idle : state_->free) state_->held -= idle.first;
      state_->free.clear();
    }
    if (!block) block = DeviceBuffer(size);
    const std::lock_guard lock(state_->mutex);
    state_->held += size;
  }
  auto* data = block.data();
  return {data, [state = state_, block = std::move(block)](std::byte*) mutable {
            const std::lock_guard lock(state->mutex);
            const auto size = block.size();
            state->free.emplace(size, std::move(block));
          }};
}

std::uint64_t Arena::held() const {
  const std::lock_guard lock(state_->mutex);
  return state_->held;
}

}  // namespace gpu
