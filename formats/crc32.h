// CRC-32, as fast as the CPU allows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace formats {

/// CRC-32 of zip files (reflected polynomial 0xedb88320) of `bytes`, as `crc32` of zlib from 0.
std::uint32_t crc32(std::span<const std::byte> bytes);

}  // namespace formats
