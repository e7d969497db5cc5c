// XXH3 built for one kind of CPU, apart from all other code.
#pragma once

#include <cstddef>
#include <cstdint>

namespace formats {

struct Xxh128 {
  std::uint64_t high, low;
};

/// XXH3-128 for a CPU that has AVX2; the same value as on any other.
Xxh128 xxh3_128_avx2(const void* bytes, std::size_t size);

}  // namespace formats
