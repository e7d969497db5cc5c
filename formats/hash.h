// The digest that `hash` prints: XXH3 with 128 bits.
#pragma once

#include "libshard/inspectors.h"

#include <string>

namespace formats {

constexpr const char* kHashAlgorithm = "xxh3-128-256KiB";
shard::Digest hash_bytes(std::span<const std::byte> bytes);
std::string hex(const shard::Digest& digest);
/// The digest of a whole model: of its tensors' names and digests in order of name.
shard::Digest combine(const std::map<std::string, shard::Digest>& digests);

}  // namespace formats
