// Carrying out a plan: the only home of threads and memory budgets. Same bytes for any number of threads.
#pragma once

#include "libshard/checkpoint.h"
#include "libshard/plan.h"
#include "libshard/sums.h"

#include <atomic>
#include <functional>
#include <string>
#include <vector>

namespace shard {

/// The operations on bytes that better libraries do; the core depends on none of them.
struct Kernels {
  std::uint32_t (*crc32)(std::span<const std::byte> bytes);
  Combine combine;
  /// Elements of one type to another, rounding to nearest even.
  void (*cast)(std::span<const std::byte> from, DType from_type, std::span<std::byte> to, DType to_type);
};

using Progress = std::function<void(std::uint64_t done, std::uint64_t all)>;

struct Budget {
  unsigned threads = 1;
  std::uint64_t memory = 256ull << 20;            ///< bytes that buffers of all threads may take together
  const std::atomic<bool>* stop = nullptr;        ///< set by a signal: execute() then throws
};

struct Report {
  std::uint64_t bytes_read = 0, bytes_written = 0, bytes_copied_in_kernel = 0;
  std::uint64_t bytes_through_device = 0;         ///< of those written; the executor here has none
  /// One per target stream that asks for a sum; of a partial plan only for the streams that it writes.
  std::vector<std::optional<std::uint32_t>> crc32;
  std::vector<Finding> findings;                  ///< checksums that do not match and replicas that differ
};

/// Throws Error{Io} where the system fails. What contradicts itself comes back as findings: do not commit then.
Report execute(const Plan& plan, const Reader& from, Writer& to, const Kernels& kernels, const Budget& budget,
               const Progress& tell = {});

/// The bytes that execute() would read and write with the same budget; none is. How many the system's kernel would copy
/// is not known before.
Report measure(const Plan& plan, const Reader& from, const Writer& to, const Budget& budget);

}  // namespace shard
