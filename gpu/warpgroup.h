// Products of a warpgroup, four warps together, as compute capability 9.0 has them: operands are read where they lie in shared memory.
// As with tensor_core.h, gpu/cuda has the instructions and gpu/emulated what they do.
//
// A panel is rows of 64 bf16, 128 bytes, that begins at a multiple of 1024 bytes; within a row, 16-byte chunk c lies at chunk_place(row, c), so that
// eight rows of one chunk lie in all banks. Wider matrices are panels side by side.
//
//   group_product<N>(block, of)         of(own, group) names {d[N / 8][4], a, b, fresh}: d (+)= a·bᵀ over 16 of the depth. a: the first of the group's
//                                       64 rows, b: the first of N, both as places in a panel where chunks are not swapped: panel + row·128 + 2·depth.
//                                       fresh: d was nothing before. Shares of d lie as mma_bf16's, the group's warp w having rows 16w … 16w + 15
//   group_product_turned<N>(block, of)  of(own) names {d[N / 8][4], a[4], b, step}: d += a·b; a: 16 of the depth in registers, as mma_bf16's a; b: rows along the
//                                       depth, of N columns, 64 a panel, and the next panel `step` bytes behind
//   group_begin<N, M>(block, of)        before products, behind whatever wrote their registers; of(own) names {d[N / 8][4], a[M][4]}, all that they use
//   group_commit(block)                 ends a batch of products
//   group_wait<N, M>(block, of)         until all batches are done; before that nobody may touch their registers
//   show_copies()                       in each thread whose copies or stores products will read, behind copy_async_wait and before a barrier
// Host: has_warpgroups() of gpu/runtime.h.
#pragma once

#include "gpu/tensor_core.h"

namespace gpu {

/// In units of 16 bytes.
GPU_CODE constexpr int chunk_place(int row, int chunk) { return chunk ^ row % 8; }

struct GroupShares {
  float (*d)[4];
  const void* a;
  const void* b;
  bool fresh;
};
struct GroupTurnedShares {
  float (*d)[4];
  const std::uint32_t* a;
  const void* b;
  unsigned step;
};
struct GroupRegisters {
  float (*d)[4];
  std::uint32_t (*a)[4];
};

}  // namespace gpu

#include <warpgroup.h>  // of gpu/cuda or gpu/emulated, as the build says
