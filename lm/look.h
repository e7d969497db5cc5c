// What a weight's numbers look like at a glance: finite, more than one number, how large.
#pragma once

#include "libshard/dtype.h"

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>

namespace lm {

struct Sight {
  bool nonfinite = false, constant = true;
  float max_abs = 0;
  double squares = 0;  ///< their sum
};

/// Of F32 or BF16 elements; the same for every number of threads. `piece` is called for every piece's bytes before they are looked at,
/// on the thread that looks.
Sight look(std::span<const std::byte> bytes, shard::DType dtype, unsigned threads, const std::function<void(std::span<const std::byte>)>& piece = {});

}  // namespace lm
