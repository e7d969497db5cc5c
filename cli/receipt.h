// Receipts: what a conversion wrote and where it came from, and the check of it later without the source.
#pragma once

#include "cli/print.h"
#include "formats/checkpoint.h"
#include "libshard/plan.h"

#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace cli {

/// What a receipt is made of, once the target is published.
struct ReceiptSource {
  const formats::Checkpoint& source;
  const shard::ShardedStateDict& target;       ///< stored tensors, as the writer described them
  const shard::Plan& plan;                     ///< the whole one
  std::vector<std::string> files;              ///< below the published folder
  std::filesystem::path published;
  formats::OpenOptions open;                   ///< how the source was opened: sizes given by hand
};

/// Writes `summary` with a key "receipt" added to FILE: per-file sizes and digests, digests of logical tensors (both read
/// back from what was published), and of every stored tensor its source boxes and transforms. Tensors are written one by one.
/// Throws Io.
void write_report(const std::string& path, Json summary, const std::optional<ReceiptSource>& receipt, const shard::Budget& budget, bool quiet);

/// What of a receipt can be checked without the source.
struct Receipt {
  struct Entry {
    std::uint64_t bytes = 0;
    std::string digest;
  };
  std::map<std::string, Entry> files;
  std::map<std::string, std::string> tensors;  ///< digests by logical key
  std::optional<shard::Index> vocab;
};

/// Throws NotFound, and BadFormat where the file is no receipt, or one of another version or algorithm.
Receipt read_receipt(const std::string& path);

/// Files that are missing or changed, tensors that are missing, unexpected or changed.
std::vector<shard::Finding> check_receipt(const Receipt& receipt, const formats::Checkpoint& checkpoint, const shard::Budget& budget, bool quiet);

}  // namespace cli
