// Products for any processor, and the choice among those compiled in.
#include "lm/cpu/tile_product.h"

namespace lm::cpu {

Products portable_products() { return {product<4, 4, 2>, nullptr, "portable"}; }

#if !defined(__x86_64__)
Products avx2_products() { return {}; }
Products avx512_products() { return {}; }
#endif

const Products& products() {
  static const Products chosen = [] {
    if (const auto best = avx512_products(); best.f32) return best;
    if (const auto good = avx2_products(); good.f32) return good;
    return portable_products();
  }();
  return chosen;
}

}  // namespace lm::cpu
