// The same XXH3 compiled for AVX2, half again as fast; alone in its file so that no other code is built for that CPU.
#define XXH_INLINE_ALL
#define XXH_VECTOR XXH_AVX2
#include <xxhash.h>

#include "formats/hash_avx2.h"

namespace formats {

Xxh128 xxh3_128_avx2(const void* bytes, std::size_t size) {
  const auto hash = XXH3_128bits(bytes, size);
  return {hash.high64, hash.low64};
}

}  // namespace formats
