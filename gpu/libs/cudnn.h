// The `fused` attention backend: cuDNN's one kernel for softmax(scale · q kᵀ + mask) v, forward, without dropout.
//
// Described to cuDNN's backend API itself, as the graph that its fused engines match: product, scale, mask, softmax in five steps, product. That is twenty
// small descriptors; the header-only frontend would add 50 000 lines to the build and a package to every machine that builds.
#pragma once

#include "gpu/runtime.h"
#include "libshard/dtype.h"

#include <cstdint>
#include <memory>
#include <string>

namespace gpu {

/// Steps between neighbours, in elements; within a head they lie together.
struct AttentionStrides {
  std::int64_t batch = 0, head = 0, token = 0;
  auto operator<=>(const AttentionStrides&) const = default;
};

struct AttentionShape {
  std::int64_t batch = 1, heads = 1, groups = 1;       ///< groups: heads of k and v, each for heads / groups heads of q
  std::int64_t queries = 0, keys = 0, head_size = 0, value_size = 0;
  shard::DType type = shard::DType::BF16;
  bool causal = true;                                  ///< row i sees keys 0 … i
  std::int64_t window = 0;                             ///< and of those only the last so many, i itself counted; 0: all
  double softcap = 0;                                  ///< not to be had; here so that the refusal can name them
  bool sinks = false;
  AttentionStrides q{}, k{}, v{}, out{};
  auto operator<=>(const AttentionShape&) const = default;
};

struct AttentionOperands {
  const std::byte *q = nullptr, *k = nullptr, *v = nullptr;
  std::byte* out = nullptr;
  float scale = 1;
};

/// One device's, for one stream at a time. A shape costs a search and maybe a compilation when it is first seen; after that a call allocates nothing and can be
/// recorded in a Graph (see a shape once before recording it).
class FusedAttention {
 public:
  /// Makes `device` current. Throws Error{Device} where cuDNN is absent or older than 9.0.
  explicit FusedAttention(int device, const std::string& path = "");
  ~FusedAttention();
  FusedAttention(FusedAttention&&) noexcept;
  FusedAttention& operator=(FusedAttention&&) noexcept;

  /// Why it cannot run `shape`: one clause, cuDNN's own where it has no engine; "" where it can. For `auto`.
  std::string why_not(const AttentionShape& shape);
  /// Throws Error{Device} with why_not's reason.
  void operator()(const AttentionShape& shape, const AttentionOperands& operands, StreamView on);
  const std::string& version() const;                  ///< "9.19.0"

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// What no version of cuDNN is asked for; "" where it may be.
std::string attention_refusal(const AttentionShape& shape);

/// How many engines cuDNN (9.8 or later) has for the shape on a device that is not here, given as cuDNN's own JSON of device properties. Throws as
/// FusedAttention does. It lets the graph be tested without a device, but not without some libcuda.so.1, such as the toolkit's stub.
std::size_t attention_engines_for(const AttentionShape& shape, const std::string& device_properties, const std::string& path = "");

}  // namespace gpu
