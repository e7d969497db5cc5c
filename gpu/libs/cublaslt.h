// Products through cuBLASLt, in the row-major terms of the ops: out[t, n] = alpha · Σ_k x[t, k] · w[n, k] + bias[n] + beta · out[t, n].
#pragma once

#include "gpu/runtime.h"
#include "libshard/dtype.h"

#include <cstdint>
#include <memory>
#include <string>

namespace gpu {

/// What a product is, without its addresses. Counts, pitches (from row to row) and steps (from one of the batch to the next) are elements.
struct MatmulShape {
  std::int64_t rows = 0, columns = 0, inner = 0;       ///< t, n, k
  shard::DType type = shard::DType::BF16;              ///< of x and w: bf16, f16, f32, f8_e4m3
  shard::DType out_type = shard::DType::BF16;          ///< and of the bias: bf16, f16, f32
  std::int64_t x_pitch = 0, w_pitch = 0, out_pitch = 0;
  bool w_by_inner = false;                             ///< w is stored [k, n], as the values of attention are; weights are [n, k]
  bool bias = false;
  bool tf32 = false;                                   ///< f32 operands may lose mantissa to be multiplied on tensor cores
  std::int64_t batch = 1, x_step = 0, w_step = 0, out_step = 0;
  shard::DType w_type = type;
  bool scaled_blocks = false;                          ///< fp8: the factors are those of gpu/ops/scaled.h, w's for whole blocks from its first number on
  auto operator<=>(const MatmulShape&) const = default;
};

struct MatmulOperands {
  const std::byte *x = nullptr, *w = nullptr, *bias = nullptr;
  std::byte* out = nullptr;
  float alpha = 1, beta = 0;
  const float *x_scale = nullptr, *w_scale = nullptr;  ///< fp8: one factor a tensor, in device memory; null is 1. With scaled_blocks: x's with a pitch of
                                                       ///< shape.rows, w's with one of inner/128
};

/// One device's products, for one stream at a time: its workspace is one piece. A shape costs a search for its algorithm when it is first
/// seen; after that a call allocates nothing and can be recorded in a Graph (see a shape once before recording it).
class Matmul {
 public:
  static constexpr std::size_t kWorkspace = 32 << 20;  ///< bytes; what cuBLAS itself takes on compute capability 9.0

  /// Makes `device` current. Throws Error{Device} where cuBLASLt is absent or too old.
  explicit Matmul(int device, const std::string& path = "");
  ~Matmul();
  Matmul(Matmul&&) noexcept;
  Matmul& operator=(Matmul&&) noexcept;

  /// Throws Error{Device} for what the device or the library cannot do: it says which.
  void operator()(const MatmulShape& shape, const MatmulOperands& operands, StreamView on);
  const std::string& version() const;                  ///< "13.0.2"

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace gpu
