// The instructions, which exist on compute capability 9.0 alone and in code made for just that (90a); elsewhere nothing may call them.
#pragma once

#include "gpu/warpgroup.h"

namespace gpu {

namespace hopper {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

/// Where a panel's rows are, for the instruction: eight rows are 1024 bytes, chunks are swapped (128-byte swizzle); `step`: from a panel to the next.
__device__ __forceinline__ std::uint64_t described(const void* at, unsigned step) {
  const auto address = static_cast<std::uint64_t>(__cvta_generic_to_shared(at));
  return (address & 0x3ffff) >> 4 | static_cast<std::uint64_t>(step >> 4) << 16 | std::uint64_t{1024 >> 4} << 32 | std::uint64_t{1} << 62;
}

// A thread's shares of d, as operands of an instruction and as their names in it.
#define D4(n) "+f"(s.d[n][0]), "+f"(s.d[n][1]), "+f"(s.d[n][2]), "+f"(s.d[n][3])
#define D64 D4(0), D4(1), D4(2), D4(3), D4(4), D4(5), D4(6), D4(7)
#define D128 D64, D4(8), D4(9), D4(10), D4(11), D4(12), D4(13), D4(14), D4(15)
#define N64 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define N128 \
  N64 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

template <int N>
__device__ __forceinline__ void product(const GroupShares& s) {
  const auto a = described(s.a, 16), b = described(s.b, 16);
  const int more = !s.fresh;
  if constexpr (N == 64)
    asm volatile(
        "{.reg .pred more; setp.ne.b32 more, %34, 0;"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" N64 "}, %32, %33, more, 1, 1, 0, 0;}"
        : D64
        : "l"(a), "l"(b), "r"(more));
  if constexpr (N == 128)
    asm volatile(
        "{.reg .pred more; setp.ne.b32 more, %66, 0;"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" N128 "}, %64, %65, more, 1, 1, 0, 0;}"
        : D128
        : "l"(a), "l"(b), "r"(more));
}

template <int N>
__device__ __forceinline__ void product_turned(const GroupTurnedShares& s) {
  const auto b = described(s.b, s.step);
  if constexpr (N == 64)
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" N64 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
        : D64
        : "r"(s.a[0]), "r"(s.a[1]), "r"(s.a[2]), "r"(s.a[3]), "l"(b));
  if constexpr (N == 128)
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" N128 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
        : D128
        : "r"(s.a[0]), "r"(s.a[1]), "r"(s.a[2]), "r"(s.a[3]), "l"(b));
}

#undef D4
#undef D64
#undef D128
#undef N64
#undef N128

/// The compiler moves nothing that reads or writes these registers past this place.
template <int N, int M>
__device__ __forceinline__ void hold(const GroupRegisters& registers) {
  GPU_UNROLL for (int n = 0; n < N / 8; ++n)
    GPU_UNROLL for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(registers.d[n][i])::"memory");
  GPU_UNROLL for (int m = 0; m < M; ++m)
    GPU_UNROLL for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(registers.a[m][i])::"memory");
}

#endif

}  // namespace hopper

template <int N, typename Block, typename Of>
GPU_CODE void group_product(Block& block, Of of) {
  static_assert(N == 64 || N == 128);
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  hopper::product<N>(of(block.own(), threadIdx.x / 128));
#else
  __trap();
#endif
}
template <int N, typename Block, typename Of>
GPU_CODE void group_product_turned(Block& block, Of of) {
  static_assert(N == 64 || N == 128);
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  hopper::product_turned<N>(of(block.own()));
#else
  __trap();
#endif
}

template <int N, int M, typename Block, typename Of>
GPU_CODE void group_begin(Block& block, Of of) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  hopper::hold<N, M>(of(block.own()));
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
template <typename Block>
GPU_CODE void group_commit(Block&) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
template <int N, int M, typename Block, typename Of>
GPU_CODE void group_wait(Block& block, Of of) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  hopper::hold<N, M>(of(block.own()));
#endif
}
GPU_CODE void show_copies() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

}  // namespace gpu
