// Causal attention in three ways. Shapes, masks, caps and sinks are lm::AttentionShape's and lm::attention's; sinks [heads] or none.
#pragma once

#include "gpu/runtime.h"
#include "gpu/view.h"
#include "lm/ops.h"

namespace gpu {

/// What attention means: scores, softmax, weighted sum, one query at a time, rounded where the CPU rounds. Value heads of at most
/// kMaxValueSize.
void local_attention(StreamView on, const lm::AttentionShape& shape, const View& q, const View& k, const View& v, const View& sinks, const View& out);
constexpr std::int64_t kMaxValueSize = 512;

/// Tiles with a running softmax; no scores are stored or rounded. bf16 with head sizes that are multiples of 8 goes through tensor cores.
/// Heads of at most kMaxFlashHead.
void flash_attention(StreamView on, const lm::AttentionShape& shape, const View& q, const View& k, const View& v, const View& sinks, const View& out);
constexpr std::int64_t kMaxFlashHead = 256;

/// Product, softmax, product. `scores` [batch·heads·length, length], of q's type, is scratch.
void unfused_attention(StreamView on, const lm::AttentionShape& shape, const View& q, const View& k, const View& v, const View& sinks,
                       const View& scores, const View& out);
std::size_t scores_bytes(const lm::AttentionShape& shape, shard::DType type);
/// Its middle step in place, where a library does the products: q·k, unscaled, becomes weights of values, 0 where nothing is seen.
void masked_softmax(StreamView on, const lm::AttentionShape& shape, const View& scores, const View& sinks);

}  // namespace gpu
