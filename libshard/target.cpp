// The last look at a target: pieces too short to be summed when they were written.
#include "libshard/target.h"

#include "libshard/parallel.h"
#include "libshard/source.h"

#include <algorithm>

namespace shard {

std::vector<std::optional<std::uint32_t>> SummedTarget::finish(const Plan& plan, unsigned threads) {
  std::vector<std::optional<std::uint32_t>> out(streams_.size());
  std::vector<char> mine(streams_.size(), !plan.partial);
  for (const auto& copy : plan.copies) mine[copy.to_stream] = true;
  std::vector<Buffers> buffers(std::max(1u, threads));
  run_tasks(streams_.size(), threads, [&](std::size_t i, unsigned worker) {
    const auto s = static_cast<std::uint32_t>(i);
    if (!streams_[s].summed || !mine[s]) return;
    for (auto [offset, length] : sums_[s].gaps(streams_[s].size))
      for (; length > 0;) {
        const auto block = Buffers::need(buffers[worker].a, std::min(kBlock, length));
        to_.read(s, offset, block);
        sums_[s].add(offset, block.size(), kernels_.crc32(block), kernels_.combine);
        offset += block.size();
        length -= block.size();
      }
    out[s] = sums_[s].whole();
  });
  return out;
}

}  // namespace shard
