// What stands between a chunk's bytes and the file: compression, shuffling and checksums, in their order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace formats::hdf5 {

struct Filter {
  int number;            ///< 1 deflate, 2 shuffle, 3 Fletcher-32, 32015 zstd
  std::size_t item = 1;  ///< of shuffle: bytes an element
};

/// Throws BadFormat where a filter is none of those.
void check_filters(const std::vector<Filter>& filters, const std::string& where);

/// A stored chunk as it was before the filters; `mask` has a bit for each filter that was left out.
/// Throws BadFormat where a checksum does not match or the size is not `size`.
std::vector<std::byte> unpack(std::vector<std::byte> stored, const std::vector<Filter>& filters, std::uint32_t mask, std::uint64_t size, const std::string& where);

/// zstd at `level`, then its Fletcher-32.
std::vector<std::byte> pack(std::span<const std::byte> chunk, int level);

}  // namespace formats::hdf5
