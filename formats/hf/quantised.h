// Weights that are stored as small numbers with scales beside them: FP8 in blocks (DeepSeek) and MXFP4 (GPT-OSS).
// A weight and its scale never part.
#pragma once

#include "formats/checkpoint.h"

#include <nlohmann/json.hpp>

namespace formats::hf {

/// A weight, its scales, and what they are together.
struct QuantisedPair {
  enum class Kind { Fp8, Mxfp4 } kind;
  std::string weight, scale;         ///< stored keys
  std::string key;                   ///< of the dequantised tensor
  shard::Index block_rows = 0, block_columns = 0;  ///< FP8
};

/// The pairs among the stored tensors. A missing partner, a scale of another shape or type is a finding, and no pair.
std::vector<QuantisedPair> quantised_pairs(const shard::ShardedStateDict& stored, const nlohmann::ordered_json& config, std::vector<shard::Finding>& findings);

/// `checkpoint.stored` with every pair replaced by one tensor of `dtype`, which is computed when it is read; without
/// one, only described. `first` gets the index of the first stream that is new. The checkpoint itself stays as it is.
shard::ShardedStateDict dequantised(const Checkpoint& checkpoint, const std::vector<QuantisedPair>& pairs, std::optional<shard::DType> dtype,
                                    std::uint32_t& first);

/// Scales of weights that stay quantised by which no finite weight comes out: zero, negative, not finite, or so large that the
/// largest number overflows. Reads them all; one finding a tensor.
std::vector<shard::Finding> scale_findings(const Checkpoint& checkpoint);

/// value = number · scale of its block; `columns` in a row, `first` is an index over all rows.
/// `numbers` are those of the range; `scales` begin with the block row that holds its first element.
void dequantise_fp8(std::span<const std::byte> numbers, std::span<const float> scales, std::uint64_t first, std::uint64_t columns,
                    std::uint64_t block_rows, std::uint64_t block_columns, std::span<float> out);

/// Whole groups of 32 elements: 16 bytes, low nibble first, and one power of two each.
void dequantise_mxfp4(std::span<const std::byte> blocks, std::span<const std::byte> scales, std::span<float> out);

}  // namespace formats::hf
