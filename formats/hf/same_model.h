// Args and config.json of one model describe the same forward pass, or the parts in which they do not.
#pragma once

#include "libshard/transformer_config.h"

#include <set>
#include <string>
#include <vector>

namespace formats::hf {

/// A thing that is computed, and what each side says of it.
struct Difference {
  std::string part;   ///< "activation"
  std::string where;  ///< "layer 3's " or ""
  std::string megatron, hugging_face;
};

/// The parts that a family's warnings speak of: Megatron-Core's own forward has no place for them.
std::set<std::string> parts_of_warnings(const std::vector<std::string>& warnings);

/// Sizes are left out: weights have them. Numbers are the same to one part in a million.
std::vector<Difference> differences(const shard::TransformerConfig& megatron, const shard::TransformerConfig& hugging_face);

}  // namespace formats::hf
