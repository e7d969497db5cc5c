// What a model takes of a device's memory, before anything is loaded.
#pragma once

#include "lm/device.h"

#include <cstdint>

namespace gpu {

/// Bytes of activations, at most, for one rank of `ranks` that passes `rows` rows through its layers and head.
std::uint64_t activation_bytes(const shard::TransformerConfig& config, const lm::Ranks& ranks, lm::Index rows);

/// What stages take on one device.
struct Demand {
  std::uint64_t weights = 0, activations = 0, libraries = 0;
  std::uint64_t least_activations = 0;               ///< of one row
  std::uint64_t all() const { return weights + activations + libraries; }
};
/// Throws Device where it is more than `available` bytes on `device` ("cuda:0"): what is short, and what would fit.
void require_fits(const Demand& demand, std::uint64_t available, const std::string& device, const lm::Ranks& ranks);

}  // namespace gpu
