// XXH3 is as fast as memory; it finds accidents, not forgers.
#include "formats/hash.h"

#include "formats/hash_avx2.h"

#include <fmt/format.h>
#include <xxhash.h>

namespace formats {

shard::Digest hash_bytes(std::span<const std::byte> bytes) {
#ifdef __x86_64__
  static const bool wide = __builtin_cpu_supports("avx2");
  if (wide) {
    const auto hash = xxh3_128_avx2(bytes.data(), bytes.size());
    return {hash.high, hash.low};
  }
#endif
  const auto hash = XXH3_128bits(bytes.data(), bytes.size());
  return {hash.high64, hash.low64};
}

std::string hex(const shard::Digest& digest) { return fmt::format("{:016x}{:016x}", digest[0], digest[1]); }

shard::Digest combine(const std::map<std::string, shard::Digest>& digests) {
  std::string text;
  for (const auto& [key, digest] : digests) text += fmt::format("{} {}\n", key, hex(digest));
  return hash_bytes(std::as_bytes(std::span(text.data(), text.size())));
}

}  // namespace formats
