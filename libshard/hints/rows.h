// Mistakes that leave every row whole but put it elsewhere: fusions taken apart wrongly, rotary pairs, padding, ranks.
#pragma once

#include "libshard/family.h"
#include "libshard/hints/sample.h"

#include <string>

namespace shard::hints {

/// What is being explained: one of b's tensors, its namesake in a, and where the two first differ (row-major).
struct Subject {
  const std::string& key;
  const ShardedTensor &a, &b;
  Index first;
  bool same_shape;
};

/// Text, or "" where none of these mistakes explains the difference.
std::string explain_fusion(const Both& both, const Subject& subject, const Window& look, const Params& params);
std::string explain_rotary(const Both& both, const Subject& subject, const Window& look, const Params& params);
std::string explain_transposed(const Both& both, const Subject& subject);
std::string explain_vocabulary(const Both& both, const Subject& subject);
std::string explain_repeated_heads(const Both& both, const Subject& subject, const Params& params);
/// Blocks of rows or columns, as tensor ranks hold them, in another order.
std::string explain_ranks(const Both& both, const Subject& subject, const Window& look);
/// Any other order of rows.
std::string explain_row_order(const Both& both, const Subject& subject, const Window& look);

}  // namespace shard::hints
