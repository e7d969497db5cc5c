// The innermost products, once per instruction set; the machine's best set is chosen when first asked for.
#pragma once

#include "libshard/box.h"

#include <cstdint>
#include <vector>

namespace lm::cpu {

using shard::Index;

/// Columns of a packed panel; every kernel takes whole panels.
constexpr Index kPanel = 32;

/// c[r][j] (+)= Σ_k a[r·lda + k] · b[k·ldb + j] for r < rows and j < columns, a multiple of 16; k ascends for every element,
/// so that a result does not depend on how the work is cut.
using ProductF32 = void (*)(const float* a, Index lda, const float* b, Index ldb, float* c, Index ldc, Index rows, Index columns, Index k,
                            bool add);
/// The same of bf16 pairs: a holds pairs (2k, 2k+1) of a row in 32 bits, b such pairs of one column; sums are f32.
using ProductBf16 = void (*)(const std::uint32_t* a, Index lda, const std::uint32_t* b, Index ldb, float* c, Index ldc, Index rows,
                             Index columns, Index pairs, bool add);

struct Products {
  ProductF32 f32;
  ProductBf16 bf16;  ///< null where the machine has no such instruction
  const char* name;  ///< for people
};
/// The best that this processor runs.
const Products& products();
/// All that it runs, the best first.
std::vector<Products> usable_products();

// One per file. On a processor without the instructions even the call may be one that it lacks.
Products avx2_products();
Products avx512_products(bool pairs);

}  // namespace lm::cpu
