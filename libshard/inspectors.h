// Walks over a checkpoint that only read: is every byte sound, what is each tensor's digest, where do two differ.
#pragma once

#include "libshard/execute.h"
#include "libshard/numeric.h"
#include "libshard/source.h"

#include <array>
#include <map>
#include <string>
#include <vector>

namespace shard {

using Digest = std::array<std::uint64_t, 2>;

/// 128-bit hash of a run of bytes.
using HashBytes = Digest (*)(std::span<const std::byte> bytes);

/// Reads every byte of every stored tensor once: checksums, numbers that are not finite (per stored tensor).
/// `stored` describes the reader's streams with the keys to report by. `replicas` are compared as well.
std::vector<Finding> scan_bytes(const Reader& from, const ShardedStateDict& stored, const Plan& replicas, const Kernels& kernels,
                                const Budget& budget, const Progress& tell = {});

/// No copy is chosen silently: those of one box in the source's streams must agree; each that does not becomes a finding.
void compare_copies(SummedSource& source, const Budget& budget, std::vector<Finding>& findings);

/// The number of leading rows (dimension 0) of a vocabulary tensor that count; others count whole.
Index rows_that_count(const ShardedTensor& tensor, std::optional<Index> vocab);

/// A digest per logical tensor that does not depend on how it is sharded: its type, natural shape and the digests of
/// its bytes in row-major order, in leaves of 256 KiB. Checksums that do not match and copies that differ come back as findings.
std::map<std::string, Digest> digest_tensors(const Reader& from, std::optional<Index> vocab, HashBytes hash, const Kernels& kernels,
                                             const Budget& budget, std::vector<Finding>& findings, const Progress& tell = {});

/// Where one logical tensor of two checkpoints differs; `first` is a row-major element index.
struct TensorDifference {
  std::string key;
  Difference difference;
  std::string note;  ///< another dtype or shape: nothing was compared
};
/// Findings as of digest_tensors, of both.
std::vector<TensorDifference> diff_tensors(const Reader& a, std::optional<Index> vocab_a, const Reader& b, std::optional<Index> vocab_b,
                                           const Kernels& kernels, const Budget& budget, std::vector<Finding>& findings,
                                           const Progress& tell = {});

}  // namespace shard
