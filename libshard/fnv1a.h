// FNV-1a, 64 bits: a name for bytes among friends. Whoever wants two texts of one name finds them; digests of content are formats/hash.h's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace shard {

constexpr std::uint64_t kFnv1aStart = 0xcbf29ce484222325;

/// Of `bytes` behind what `hash` is the name of.
inline std::uint64_t fnv1a(std::span<const std::byte> bytes, std::uint64_t hash = kFnv1aStart) {
  for (const auto byte : bytes) hash = (hash ^ std::to_integer<std::uint64_t>(byte)) * 0x100000001b3;
  return hash;
}

}  // namespace shard
