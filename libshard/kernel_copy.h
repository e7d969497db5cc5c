// Moving a byte range between two files inside the kernel, where it can.
#pragma once

#include "libshard/checkpoint.h"

namespace shard {

/// Bytes moved from the start of the range: all of it, or fewer where the file systems refuse (the caller goes on by
/// itself). Throws Io on a real failure.
std::uint64_t kernel_copy(FileRange from, FileRange to, std::uint64_t bytes);

}  // namespace shard
