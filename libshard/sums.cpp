// Joining the sums of adjacent pieces.
#include "libshard/sums.h"

namespace shard {

void StreamSum::add(std::uint64_t offset, std::uint64_t length, std::uint32_t crc, Combine combine) {
  if (length == 0) return;
  const std::lock_guard lock(mutex_);
  auto next = pieces_.lower_bound(offset);
  if (next != pieces_.end() && next->first < offset + length) return;
  if (next != pieces_.begin()) {
    const auto previous = std::prev(next);
    const auto end = previous->first + previous->second.length;
    if (end > offset) return;
    if (end == offset) {
      crc = combine(previous->second.crc, crc, length);
      length += previous->second.length;
      offset = previous->first;
      pieces_.erase(previous);
    }
  }
  if (next != pieces_.end() && next->first == offset + length) {
    crc = combine(crc, next->second.crc, next->second.length);
    length += next->second.length;
    next = pieces_.erase(next);
  }
  pieces_.emplace_hint(next, offset, Piece{length, crc});
}

std::vector<std::pair<std::uint64_t, std::uint64_t>> StreamSum::gaps(std::uint64_t size) const {
  const std::lock_guard lock(mutex_);
  std::vector<std::pair<std::uint64_t, std::uint64_t>> out;
  std::uint64_t at = 0;
  for (const auto& [offset, piece] : pieces_) {
    if (offset > at) out.emplace_back(at, offset - at);
    at = offset + piece.length;
  }
  if (at < size) out.emplace_back(at, size - at);
  return out;
}

std::uint32_t StreamSum::whole() const {
  const std::lock_guard lock(mutex_);
  return pieces_.empty() ? 0 : pieces_.begin()->second.crc;
}

bool StreamSum::touched() const {
  const std::lock_guard lock(mutex_);
  return !pieces_.empty();
}

std::vector<std::array<std::uint64_t, 3>> StreamSum::pieces() const {
  const std::lock_guard lock(mutex_);
  std::vector<std::array<std::uint64_t, 3>> out;
  for (const auto& [offset, piece] : pieces_) out.push_back({offset, piece.length, piece.crc});
  return out;
}

}  // namespace shard
