// Warp-wide work on fragments of matrices: every thread of a warp takes part, each with its share in registers, as PTX lays shares out.
// As with platform.h, gpu/cuda has the instructions and gpu/emulated what they do.
//
//   mma_bf16(block, of)               of(own) names {d[4], a[4], b[2]}: d += a·b, where a is 16×16 and b 16×8 of bf16, d 16×8 of f32.
//                                     Thread t has of d rows t/4 and t/4+8, columns 2(t%4) and the next; of a the same rows, of b column
//                                     t/4, and the pairs along the depth that start at 2(t%4) and 2(t%4)+8.
//   load_matrices<Turned>(block, of)  of(thread, own) names {to[4], row}: four 8×8 matrices of bf16 from shared memory, thread t naming row
//                                     t%8 of matrix t/8; thread t gets row t/4, columns 2(t%4) and the next of each – or, Turned, of
//                                     its transpose.
//   quad_max(block, of), quad_sum     over the four threads that share rows of d; of(own) names the value
//   copy_async(to, from, there)       16 bytes from device memory to shared, zeros where they are not there; done behind
//   copy_async_wait()                 in the same thread, seen by others behind a barrier after it
//   pack_bf16(low, high)              two neighbours rounded
//   power_of_two(x)                   2^x within 2 ULP, 0 for −∞
#pragma once

#include "gpu/kernel.h"

#include <cstdint>

namespace gpu {

struct MmaShares {
  float* d;
  const std::uint32_t* a;
  const std::uint32_t* b;
};
struct MatrixShares {
  std::uint32_t* to;
  const void* row;
};

}  // namespace gpu

#include <tensor_core.h>  // of gpu/cuda or gpu/emulated, as the build says
