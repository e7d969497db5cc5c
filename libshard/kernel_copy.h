// Moving a byte range between two files inside the kernel, where it can.
#pragma once

#include "libshard/checkpoint.h"
#include "libshard/plan.h"

namespace shard {

/// Bytes moved from the start of the range: all of it, or fewer where the file systems refuse (the caller goes on by
/// itself). Throws Io on a real failure.
std::uint64_t kernel_copy(FileRange from, FileRange to, std::uint64_t bytes);
/// The same for bytes [begin, end) of a copy without loops; 0 where an end is no file.
std::uint64_t kernel_copy(const Reader& from, Writer& to, const Copy& copy, std::uint64_t begin, std::uint64_t end);

constexpr std::uint64_t kKernelRun = 64 << 10;  ///< shorter runs are not worth the call

}  // namespace shard
