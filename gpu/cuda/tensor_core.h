// The instructions, of compute capability 8.0 and later.
#pragma once

#include "gpu/tensor_core.h"

namespace gpu {

template <typename Block, typename Of>
GPU_CODE void mma_bf16(Block& block, Of of) {
  const MmaShares m = of(block.own());
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(m.d[0]), "+f"(m.d[1]), "+f"(m.d[2]), "+f"(m.d[3])
               : "r"(m.a[0]), "r"(m.a[1]), "r"(m.a[2]), "r"(m.a[3]), "r"(m.b[0]), "r"(m.b[1]));
}

template <bool kTurned, typename Block, typename Of>
GPU_CODE void load_matrices(Block& block, Of of) {
  const MatrixShares m = of(threadIdx.x, block.own());
  const auto row = static_cast<std::uint32_t>(__cvta_generic_to_shared(m.row));
  if constexpr (kTurned)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m.to[0]), "=r"(m.to[1]), "=r"(m.to[2]), "=r"(m.to[3])
                 : "r"(row)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m.to[0]), "=r"(m.to[1]), "=r"(m.to[2]), "=r"(m.to[3])
                 : "r"(row)
                 : "memory");
}

template <typename Block, typename Of>
GPU_CODE void quad_max(Block& block, Of of) {
  float& value = of(block.own());
  for (unsigned step = 2; step > 0; step /= 2) {
    const float other = __shfl_xor_sync(~0u, value, step);
    value = other > value ? other : value;
  }
}
template <typename Block, typename Of>
GPU_CODE void quad_sum(Block& block, Of of) {
  float& value = of(block.own());
  for (unsigned step = 2; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
}

GPU_CODE void copy_async(void* to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<std::uint32_t>(__cvta_generic_to_shared(to))), "l"(from),
               "r"(there ? 16 : 0)
               : "memory");
}
GPU_CODE void copy_async_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

GPU_CODE float power_of_two(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}
GPU_CODE std::uint32_t pack_bf16(float low, float high) {
  std::uint32_t out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}

}  // namespace gpu
