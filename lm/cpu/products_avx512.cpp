// Products in 512-bit vectors, and of bf16 pairs where the processor multiplies those; compiled for AVX-512 only here.
#include "lm/cpu/tile_product.h"

#include <immintrin.h>

namespace lm::cpu {
namespace {

constexpr int kRows = 12;

template <int Rows, int Vectors>
void pairs_tile(const std::uint32_t* a, Index lda, const std::uint32_t* b, Index ldb, float* c, Index ldc, Index pairs, bool add) {
  __m512 sum[Rows][Vectors];
// Unrolled early, or GCC keeps the sums in memory around the loop.
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) sum[r][v] = add ? _mm512_loadu_ps(c + r * ldc + v * 16) : _mm512_setzero_ps();
  for (Index i = 0; i < pairs; ++i) {
    __m512i right[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) right[v] = _mm512_loadu_si512(b + i * ldb + v * 16);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const auto left = _mm512_set1_epi32(static_cast<int>(a[r * lda + i]));
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], (__m512bh)left, (__m512bh)right[v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) _mm512_storeu_ps(c + r * ldc + v * 16, sum[r][v]);
}

template <int Rows, int Vectors>
void pairs_rows(const std::uint32_t* a, Index lda, const std::uint32_t* b, Index ldb, float* c, Index ldc, Index rows, Index pairs, bool add) {
  if (rows == Rows) return pairs_tile<Rows, Vectors>(a, lda, b, ldb, c, ldc, pairs, add);
  if constexpr (Rows > 1) pairs_rows<Rows - 1, Vectors>(a, lda, b, ldb, c, ldc, rows, pairs, add);
}

void pairs_product(const std::uint32_t* a, Index lda, const std::uint32_t* b, Index ldb, float* c, Index ldc, Index rows, Index columns,
                   Index pairs, bool add) {
  for (Index j = 0; j < columns;) {
    const bool wide = columns - j >= 32;
    for (Index r = 0; r < rows; r += kRows) {
      const auto left = rows - r < kRows ? rows - r : kRows;
      if (wide) pairs_rows<kRows, 2>(a + r * lda, lda, b + j, ldb, c + r * ldc + j, ldc, left, pairs, add);
      else pairs_rows<kRows, 1>(a + r * lda, lda, b + j, ldb, c + r * ldc + j, ldc, left, pairs, add);
    }
    j += wide ? 32 : 16;
  }
}

}  // namespace

Products avx512_products(bool pairs) { return {product<16, kRows, 2>, pairs ? pairs_product : nullptr, "avx512"}; }

}  // namespace lm::cpu
