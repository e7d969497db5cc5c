// The byte operations that libraries give the executor.
#pragma once

#include "libshard/execute.h"

namespace formats {

/// The CRC-32 of zip files, zlib's way to join two sums, and our casts.
const shard::Kernels& kernels();

}  // namespace formats
