// CRC-32 sums over whole streams, gathered from pieces that arrive in any order. The sum itself is given by the caller.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

namespace shard {

/// How two sums join: crc32(a ++ b) from crc32(a), crc32(b) and the length of b.
using Combine = std::uint32_t (*)(std::uint32_t a, std::uint32_t b, std::uint64_t length_of_b);

/// The pieces of one stream that are summed so far. Thread safe.
class StreamSum {
 public:
  /// Adds the sum of [offset, offset + length); a piece that meets one already there is ignored (it was read twice).
  void add(std::uint64_t offset, std::uint64_t length, std::uint32_t crc, Combine combine);
  /// The ranges of [0, size) that no piece covers.
  std::vector<std::pair<std::uint64_t, std::uint64_t>> gaps(std::uint64_t size) const;
  /// The sum over [0, size); only without gaps.
  std::uint32_t whole() const;
  bool touched() const;
  /// offset, length, crc of every piece: what a separate process hands on.
  std::vector<std::array<std::uint64_t, 3>> pieces() const;

 private:
  struct Piece {
    std::uint64_t length;
    std::uint32_t crc;
  };
  mutable std::mutex mutex_;
  std::map<std::uint64_t, Piece> pieces_;
};

}  // namespace shard
