// Products for any processor, and the choice among those compiled in.
#include "lm/cpu/tile_product.h"

namespace lm::cpu {

std::vector<Products> usable_products() {
  std::vector<Products> out;
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    out.push_back(avx512_products(__builtin_cpu_supports("avx512bf16")));
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) out.push_back(avx2_products());
#endif
  out.push_back({product<4, 4, 2>, nullptr, "portable"});
  return out;
}

const Products& products() {
  static const Products chosen = usable_products().front();
  return chosen;
}

}  // namespace lm::cpu
