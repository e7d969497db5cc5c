// CUDA's status codes as the project's errors.
#pragma once

#include "libshard/error.h"

#include <cuda_runtime_api.h>

namespace gpu {

/// `doing`: what was tried, as a clause.
inline void check(cudaError_t status, const char* doing) {
  shard::require(status == cudaSuccess, shard::Code::Device,
                 [&] { return fmt::format("device: {}: {} ({})", doing, cudaGetErrorString(status), cudaGetErrorName(status)); });
}

}  // namespace gpu
