// The digest of a whole file, read in leaves by several threads.
#pragma once

#include "libshard/inspectors.h"

#include <cstdint>
#include <filesystem>

namespace formats {

struct FileDigest {
  std::uint64_t bytes = 0;
  shard::Digest digest{};
};

/// The XXH3-128 of the XXH3-128 digests of the file's leaves of 256 KiB. Throws NotFound, or Io where reading fails.
FileDigest digest_file(const std::filesystem::path& path, const shard::Budget& budget);

}  // namespace formats
