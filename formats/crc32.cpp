// Every byte of .pt and .distcp is summed twice, so the sum must not cost more than reading from a cache. libdeflate is
// used up to 256 bytes and on other CPUs; where 512-bit carry-less products exist, folding with them is four times faster.
// Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ", 2009.
#include "formats/crc32.h"

#include <libdeflate.h>

#include <cstring>

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace formats {
namespace {

std::uint32_t plain(std::uint32_t crc, std::span<const std::byte> bytes) { return libdeflate_crc32(crc, bytes.data(), bytes.size()); }

#ifdef __x86_64__

#define WIDE __attribute__((target("avx512f,vpclmulqdq")))

constexpr std::size_t kBlock = 256;

/// x^n modulo the polynomial, bits reversed, shifted to where a carry-less product wants it.
constexpr long long power(int n) {
  std::uint32_t value = 0x80000000;
  for (; n > 0; --n) value = (value & 1) != 0 ? value >> 1 ^ 0xedb88320 : value >> 1;
  return static_cast<long long>(value) << 1;
}

/// Moves 128-bit lanes `bits` forward and adds what lies there.
template <int bits>
WIDE __m512i fold(__m512i lanes, __m512i next) {
  constexpr auto lo = power(bits + 32), hi = power(bits - 32);
  const auto by = _mm512_set_epi64(hi, lo, hi, lo, hi, lo, hi, lo);
  return _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(lanes, by, 0x00), _mm512_clmulepi64_epi128(lanes, by, 0x11), next, 0x96);
}

WIDE std::uint32_t folded(std::span<const std::byte> bytes) {
  const auto load = [&](std::size_t at) WIDE { return _mm512_loadu_si512(bytes.data() + at); };
  auto a = _mm512_xor_si512(load(0), _mm512_zextsi128_si512(_mm_cvtsi32_si128(-1))), b = load(64), c = load(128), d = load(192);
  std::size_t at = kBlock;
  for (; at + kBlock <= bytes.size(); at += kBlock) {
    a = fold<2048>(a, load(at));
    b = fold<2048>(b, load(at + 64));
    c = fold<2048>(c, load(at + 128));
    d = fold<2048>(d, load(at + 192));
  }
  std::byte rest[64];
  _mm512_storeu_si512(rest, fold<512>(fold<512>(fold<512>(a, b), c), d));
  return plain(plain(0xffffffff, rest), bytes.subspan(at));
}

#endif

}  // namespace

std::uint32_t crc32(std::span<const std::byte> bytes) {
#ifdef __x86_64__
  static const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("vpclmulqdq");
  if (wide && bytes.size() >= kBlock) return folded(bytes);
#endif
  return plain(0, bytes);
}

}  // namespace formats
