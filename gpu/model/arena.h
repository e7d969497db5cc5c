// Device memory for what ops make, kept and handed out again. For one stream: a block that is let go may be reused by work behind it.
#pragma once

#include "gpu/runtime.h"

#include <map>
#include <memory>
#include <mutex>

namespace gpu {

class Arena {
 public:
  Arena() : state_(std::make_shared<State>()) {}
  /// At least `bytes`, aligned to 256, not zeroed. Goes back to this arena when let go, which may outlive it.
  std::shared_ptr<std::byte> take(std::size_t bytes) const;
  /// Bytes that it holds, handed out or not.
  std::uint64_t held() const;

 private:
  struct State {
    std::mutex mutex;
    std::multimap<std::size_t, DeviceBuffer> free;
    std::uint64_t held = 0;
  };
  std::shared_ptr<State> state_;
};

}  // namespace gpu
