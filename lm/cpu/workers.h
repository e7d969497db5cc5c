// Threads that stay: every op of a rank runs on the same few, whose scratch memory stays warm.
#pragma once

#include <atomic>
#include <cstddef>
#include <functional>

namespace lm::cpu {

/// Calls task(i) once for every i < count on the calling thread and threads − 1 helpers of its own, in ascending order of
/// starting; the first error is thrown. Helpers belong to the calling thread and end with it. Once `stop` is set no further task is
/// started, and Io is thrown.
void run_on_workers(std::size_t count, unsigned threads, const std::function<void(std::size_t task)>& task, const std::atomic<bool>* stop = nullptr);

}  // namespace lm::cpu
