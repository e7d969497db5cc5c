// The register tile of a product, in vectors of the compiler's; each including file compiles it for another instruction set.
#pragma once

#include "lm/cpu/kernel.h"

#include <cstring>

namespace lm::cpu {
namespace {  // not shared between files: their instruction sets differ

template <int Lanes>
struct VectorOf;
template <>
struct VectorOf<4> {
  typedef float Type __attribute__((vector_size(16), aligned(4), may_alias));
};
template <>
struct VectorOf<8> {
  typedef float Type __attribute__((vector_size(32), aligned(4), may_alias));
};
template <>
struct VectorOf<16> {
  typedef float Type __attribute__((vector_size(64), aligned(4), may_alias));
};

template <int Lanes, int Rows, int Vectors>
void tile(const float* a, Index lda, const float* b, Index ldb, float* c, Index ldc, Index k, bool add) {
  using Vector = typename VectorOf<Lanes>::Type;
  Vector sum[Rows][Vectors];
// Unrolled early, or GCC keeps the sums in memory around the loop.
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) sum[r][v] = add ? *reinterpret_cast<const Vector*>(c + r * ldc + v * Lanes) : Vector{} ;
  for (Index i = 0; i < k; ++i) {
    Vector right[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) right[v] = *reinterpret_cast<const Vector*>(b + i * ldb + v * Lanes);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const float left = a[r * lda + i];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) sum[r][v] += left * right[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) *reinterpret_cast<Vector*>(c + r * ldc + v * Lanes) = sum[r][v];
}

/// `rows` ≤ Rows.
template <int Lanes, int Rows, int Vectors>
void rows_tile(const float* a, Index lda, const float* b, Index ldb, float* c, Index ldc, Index rows, Index k, bool add) {
  if (rows == Rows) return tile<Lanes, Rows, Vectors>(a, lda, b, ldb, c, ldc, k, add);
  if constexpr (Rows > 1) rows_tile<Lanes, Rows - 1, Vectors>(a, lda, b, ldb, c, ldc, rows, k, add);
}

template <int Lanes, int Rows, int Vectors>
void product(const float* a, Index lda, const float* b, Index ldb, float* c, Index ldc, Index rows, Index columns, Index k, bool add) {
  constexpr Index kWide = Lanes * Vectors;
  for (Index j = 0; j < columns;) {
    const bool wide = columns - j >= kWide;
    for (Index r = 0; r < rows; r += Rows) {
      const auto left = rows - r < Rows ? rows - r : Rows;
      if (wide) rows_tile<Lanes, Rows, Vectors>(a + r * lda, lda, b + j, ldb, c + r * ldc + j, ldc, left, k, add);
      else rows_tile<Lanes, Rows, 1>(a + r * lda, lda, b + j, ldb, c + r * ldc + j, ldc, left, k, add);
    }
    j += wide ? kWide : Lanes;
  }
}

}  // namespace
}  // namespace lm::cpu
