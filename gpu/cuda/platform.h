// Blocks of kernels as CUDA runs them.
#pragma once

#include "gpu/cuda/check.h"
#include "gpu/runtime.h"

#include <cuda_runtime.h>

#define GPU_CODE __device__ __forceinline__
#define GPU_UNROLL _Pragma("unroll")

namespace gpu {

template <typename Kernel>
class Block {
 public:
  using Shared = typename Kernel::Shared;
  using Own = typename Kernel::Own;
  static constexpr unsigned kWarps = Kernel::kThreads / 32;

  __device__ explicit Block(Shared& shared) : shared_(shared) {}
  __device__ unsigned x() const { return blockIdx.x; }
  __device__ unsigned y() const { return blockIdx.y; }
  __device__ unsigned z() const { return blockIdx.z; }
  __device__ Shared& shared() { return shared_; }

  template <typename Body>
  GPU_CODE void each(Body&& body) {
    body(threadIdx.x, own_);
    __syncthreads();
  }
  template <typename Body>
  GPU_CODE void each_apart(Body&& body) {
    body(threadIdx.x, own_);
  }
  template <typename T>
  GPU_CODE void warp_sum(T Own::* field) {
    for (unsigned step = 16; step > 0; step /= 2) own_.*field += __shfl_xor_sync(~0u, own_.*field, step);
  }
  template <typename T>
  GPU_CODE void warp_max(T Own::* field) {
    for (unsigned step = 16; step > 0; step /= 2) {
      const T other = __shfl_xor_sync(~0u, own_.*field, step);
      own_.*field = other > own_.*field ? other : own_.*field;
    }
  }
  template <typename T>
  GPU_CODE void sum(T Own::* field) {
    warp_sum(field);
    join(field, [](T a, T b) { return a + b; });
  }
  template <typename T>
  GPU_CODE void max(T Own::* field) {
    warp_max(field);
    join(field, [](T a, T b) { return b > a ? b : a; });
  }
  GPU_CODE Own& own() { return own_; }  ///< for warp-wide instructions of gpu/cuda

 private:
  template <typename T, typename Op>
  GPU_CODE void join(T Own::* field, Op op) {
    __shared__ T parts[kWarps];
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = own_.*field;
    __syncthreads();
    T all = parts[0];
    for (unsigned w = 1; w < kWarps; ++w) all = op(all, parts[w]);
    __syncthreads();
    own_.*field = all;
  }

  Shared& shared_;
  Own own_;
};

/// Blocks that should find room on a multiprocessor, where a kernel says so; 0 leaves it to the compiler, where 1 would let it take all registers.
template <typename Kernel>
constexpr unsigned blocks_together() {
  if constexpr (requires { Kernel::kTogether; }) return Kernel::kTogether;
  else return 0;
}

template <typename Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, blocks_together<Kernel>()) run_block(const __grid_constant__ Kernel kernel) {
  extern __shared__ __align__(1024) unsigned char memory[];
  Block<Kernel> block(*reinterpret_cast<typename Kernel::Shared*>(memory));
  kernel(block);
}

template <typename Kernel>
void launch(StreamView on, const Grid& grid, const Kernel& kernel) {
  check_kernel<Kernel>();
  if (!check_grid(grid)) return;
  constexpr auto shared = std::is_empty_v<typename Kernel::Shared> ? 0 : sizeof(typename Kernel::Shared);
  if constexpr (shared > (48 << 10))
    check(cudaFuncSetAttribute(run_block<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)), "shared memory");
  const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
  run_block<Kernel><<<blocks, Kernel::kThreads, shared, static_cast<cudaStream_t>(on.handle)>>>(kernel);
  check(cudaGetLastError(), "launch");
}

GPU_CODE Words load_once(const void* from) {
  Words out;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(out.item[0]), "=r"(out.item[1]), "=r"(out.item[2]), "=r"(out.item[3])
               : "l"(from));
  return out;
}
template <typename T>
GPU_CODE void atomic_add(T* to, T value) {
  atomicAdd(to, value);
}
template <typename T>
GPU_CODE void atomic_max(T* to, T value) {
  atomicMax(to, value);
}

}  // namespace gpu
