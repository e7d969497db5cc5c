// Products in 256-bit vectors with fused multiply-add; compiled for AVX2 whatever the rest is compiled for.
#include "lm/cpu/tile_product.h"

namespace lm::cpu {

Products avx2_products() {
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return {};
  return {product<8, 6, 2>, nullptr, "avx2"};
}

}  // namespace lm::cpu
