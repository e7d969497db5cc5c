// The flag that a signal, or whoever waits no longer, sets to end long work.
#pragma once

#include "libshard/error.h"

#include <atomic>

namespace shard {

/// Throws Io once `stop` is set; null: nothing stops the work.
inline void refuse_stopped(const std::atomic<bool>* stop) {
  require(!stop || !stop->load(std::memory_order_relaxed), Code::Io, [] { return "stopped by a signal"; });
}

}  // namespace shard
