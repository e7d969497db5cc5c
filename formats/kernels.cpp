// libdeflate sums several times faster than zlib; only zlib joins sums.
#include "formats/kernels.h"

#include "libshard/numeric.h"

#include <libdeflate.h>
#include <zlib.h>

namespace formats {
namespace {

std::uint32_t crc32_of(std::span<const std::byte> bytes) { return libdeflate_crc32(0, bytes.data(), bytes.size()); }

std::uint32_t join(std::uint32_t a, std::uint32_t b, std::uint64_t length_of_b) {
  return static_cast<std::uint32_t>(crc32_combine(a, b, static_cast<z_off_t>(length_of_b)));
}

}  // namespace

const shard::Kernels& kernels() {
  static const shard::Kernels kernels{crc32_of, join, shard::cast};
  return kernels;
}

}  // namespace formats
