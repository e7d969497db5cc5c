// Who multiplies in fp8: cuBLASLt where it takes scales of blocks and its first product was ours, else gpu/ops/scaled.
#pragma once

#include "gpu/libs/cublaslt.h"
#include "gpu/ops/scaled.h"

#include <fmt/format.h>

#include <set>
#include <string>

namespace gpu {

class ScaledProducts {
 public:
  /// Compares a product of `library`, which outlives this, with one of our own; null: there is none.
  ScaledProducts(Matmul* library, StreamView on);
  /// By whom, and why: for people.
  std::string by() const { return refused_.empty() ? by_ : fmt::format("{} ({} shapes were refused)", by_, refused_.size()); }
  /// As scaled_linear().
  void operator()(const ScaledRows& x, const ScaledWeight& w, const View& bias, const View& out, StreamView on);

 private:
  Matmul* library_;
  std::set<MatmulShape> refused_;                      ///< that the library has no kernel for
  std::string by_;
};

}  // namespace gpu
