// A stage's weights on their way from a checkpoint to the device memory of the ranks that hold parts of them.
#pragma once

#include "gpu/libs/nccl.h"
#include "gpu/model/resident.h"
#include "lm/device.h"

namespace gpu {

/// Bytes that a rank packs at a time, at most (one row of a weight is always taken). There are two such batches in pinned memory and, where ranks
/// send each other boxes, in device memory.
constexpr std::size_t kLoadBatch = 16 << 20;

/// Brings `to`, which holds plan.parts[rank], what it holds. With `peers`, the stage's ranks: each use is taken from `stream` by its reader, which sends the
/// others their boxes; all ranks must call this with the same plan and batch. Without, this rank takes every use. Returns when all is there.
void load_weights(lm::WeightStream& stream, const lm::StagePlan& plan, int rank, Resident& to, Communicator* peers, StreamView on, std::size_t batch = kLoadBatch);

}  // namespace gpu
