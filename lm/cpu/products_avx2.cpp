// Products in 256-bit vectors with fused multiply-add; compiled for AVX2 whatever the rest is compiled for.
#include "lm/cpu/tile_product.h"

namespace lm::cpu {

Products avx2_products() { return {product<8, 6, 2>, nullptr, "avx2"}; }

}  // namespace lm::cpu
