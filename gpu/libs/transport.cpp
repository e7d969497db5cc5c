// NCCL takes one rank a device and one version among all; anything else goes through the host.
#include "gpu/libs/nccl.h"

#include "libshard/error.h"

#include <map>

namespace gpu {

Transport choose_transport(std::span<const RankDevice> ranks) {
  if (ranks.size() < 2) return {false, "there is one rank"};
  std::map<std::string, std::size_t> seen;
  for (std::size_t r = 0; r < ranks.size(); ++r) {
    if (ranks[r].nccl.empty()) return {false, fmt::format("rank {} has no NCCL ({})", r, ranks[r].why_no_nccl)};
    if (ranks[r].nccl != ranks[0].nccl) return {false, fmt::format("rank 0 has NCCL {}, rank {} has {}", ranks[0].nccl, r, ranks[r].nccl)};
    const auto [other, fresh] = seen.emplace(ranks[r].board, r);
    if (!fresh) return {false, fmt::format("ranks {} and {} share {}, and NCCL takes one rank a device", other->second, r, ranks[r].board)};
  }
  return {true, fmt::format("every rank has a device of its own and NCCL {}", ranks[0].nccl)};
}

}  // namespace gpu
