// Where sums and casts come from.
#include "formats/kernels.h"

#include "formats/crc32.h"
#include "libshard/numeric.h"

#include <zlib.h>

namespace formats {
namespace {

std::uint32_t join(std::uint32_t a, std::uint32_t b, std::uint64_t length_of_b) {
  return static_cast<std::uint32_t>(crc32_combine(a, b, static_cast<z_off_t>(length_of_b)));
}

}  // namespace

const shard::Kernels& kernels() {
  static const shard::Kernels kernels{crc32, join, shard::cast};
  return kernels;
}

}  // namespace formats
