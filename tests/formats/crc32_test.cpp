#include "formats/crc32.h"

#include <doctest/doctest.h>
#include <zlib.h>

#include <random>
#include <vector>

TEST_CASE("CRC-32 is zlib's at any length and alignment") {
  std::mt19937 random(7);
  std::vector<unsigned char> bytes(5000);
  for (auto& byte : bytes) byte = static_cast<unsigned char>(random());
  for (std::size_t size = 0; size < 1100; ++size)
    for (const std::size_t at : {std::size_t{0}, size % 67}) {
      const std::span part(bytes.data() + at, size);
      REQUIRE(formats::crc32(std::as_bytes(part)) == ::crc32(0, part.data(), static_cast<unsigned>(size)));
    }
  REQUIRE(formats::crc32(std::as_bytes(std::span(bytes))) == ::crc32(0, bytes.data(), 5000));
}
