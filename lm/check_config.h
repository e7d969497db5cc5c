// Sizes that a forward pass relies on, checked once: a configuration comes from a stranger's file.
#pragma once

#include "libshard/transformer_config.h"

namespace lm {

/// Throws Mismatch naming the size that cannot be.
void check_config(const shard::TransformerConfig& config);

}  // namespace lm
