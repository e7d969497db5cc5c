// Running many independent tasks on a few threads; the first error stops the rest and is thrown to the caller.
#pragma once

#include <cstddef>
#include <functional>

namespace shard {

/// Calls task(i, worker) once for every i < count. Workers start at evenly spread places, so that neighbours (which
/// often share a file) stay with one worker, and help each other at the end.
void run_tasks(std::size_t count, unsigned threads, const std::function<void(std::size_t task, unsigned worker)>& task);

}  // namespace shard
