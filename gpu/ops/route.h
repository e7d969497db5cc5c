// Which experts a token goes to and with what weight, and the order of rows in which experts take them. All of it stays on the device.
#pragma once

#include "gpu/runtime.h"
#include "gpu/view.h"
#include "libshard/transformer_config.h"

namespace gpu {

constexpr std::int64_t kMaxExperts = 1024, kMaxTopk = 32;

/// As lm::route: `logits` [tokens, experts] F32 or BF16, `bias` [experts] or none only takes part in choosing. `rounded`: weights are
/// rounded to bf16. Writes expert and weight [tokens, topk], larger choices first, of equal ones the first expert.
void route(StreamView on, const shard::RouterConfig& config, const View& logits, const View& bias, bool rounded, std::int32_t* expert, float* weight);

/// Rows of experts one after another: expert e has rows offsets[e] … offsets[e+1]−1, its tokens ascending.
struct Permutation {
  std::int32_t* offsets = nullptr;  ///< [experts + 1]
  std::int32_t* tiles = nullptr;    ///< [experts + 1]: runs of kExpertTile rows before each expert, for grouped_linear
  std::int32_t* token = nullptr;    ///< [tokens·topk]: whose row it is
  float* weight = nullptr;          ///< [tokens·topk], in the rows' order
  std::int32_t* row = nullptr;      ///< [tokens, topk]: the row of a token's k-th expert
};
constexpr std::int64_t kExpertTile = 64;

/// No token may name an expert twice, as route() never does.
void permute(StreamView on, std::int64_t tokens, std::int64_t topk, std::int64_t experts, const std::int32_t* expert, const float* weight,
             const Permutation& out);

/// out[t] = ((0 + x[row of its lowest expert]) + x[of the next]) + …, rounded after each addition. `x` [tokens·topk, columns].
void combine(StreamView on, const View& out, const View& x, std::int64_t topk, const std::int32_t* row);

}  // namespace gpu
