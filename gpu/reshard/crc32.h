// CRC-32 of pieces of device memory: what zip files record, the numbers that libdeflate gives on the host.
#pragma once

#include "gpu/runtime.h"

#include <array>
#include <cstdint>

namespace gpu::reshard {

// The sum is a polynomial over GF(2) modulo the generator, bit 31 its constant term.

constexpr std::uint32_t kCrcPolynomial = 0xedb88320;
constexpr std::uint32_t crc_times_x(std::uint32_t a) { return (a & 1) != 0 ? a >> 1 ^ kCrcPolynomial : a >> 1; }
constexpr std::uint32_t crc_product(std::uint32_t a, std::uint32_t b) {
  std::uint32_t out = 0;
  for (int bit = 31; bit >= 0; --bit, b = crc_times_x(b)) out ^= (a >> bit & 1) != 0 ? b : 0;
  return out;
}
/// x^n; the generator is primitive, so that n counts modulo 2^32 - 1.
constexpr std::uint32_t crc_power(std::uint64_t n) {
  n %= 0xffffffff;
  std::uint32_t out = 0x80000000, square = 0x40000000;
  for (; n > 0; n >>= 1, square = crc_product(square, square))
    if ((n & 1) != 0) out = crc_product(out, square);
  return out;
}

/// A piece, and where its sum belongs.
struct CrcPiece {
  std::uint64_t at;     ///< from `base`
  std::uint32_t bytes;  ///< at most kCrcPiece
};
constexpr std::uint32_t kCrcPiece = 64 << 10;  ///< what one block sums

/// Constants of the kernel, in the memory of the current device.
class CrcTables {
 public:
  explicit CrcTables(StreamView on);
  const std::byte* data() const { return buffer_.data(); }

 private:
  DeviceBuffer buffer_;
};

/// out[i] = crc32(pieces[i]); `pieces`, `base` (aligned to 16 bytes) and `out` in device memory.
void crc32_pieces(const CrcTables& tables, const CrcPiece* pieces, std::uint32_t count, const std::byte* base, std::uint32_t* out, StreamView on);

}  // namespace gpu::reshard
