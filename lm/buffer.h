// Memory for activations and weights, kept for reuse: fresh pages cost the kernel as much as reading them full.
#pragma once

#include <cstddef>
#include <memory>

namespace lm {

/// At least `bytes`, aligned to 64, not zeroed; goes back to the process's pool. Thread safe.
std::shared_ptr<std::byte> take_buffer(std::size_t bytes);

}  // namespace lm
