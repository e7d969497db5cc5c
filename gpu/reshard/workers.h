// Workers with two lanes each: while the device works for one, its worker reads into the other; with several workers reads, uploads,
// kernels, downloads and writes overlap.
#pragma once

#include "gpu/reshard/execute.h"
#include "gpu/reshard/lane.h"

#include <functional>
#include <memory>
#include <vector>

namespace gpu::reshard {

/// As many lanes as threads keep busy and all memories hold; images as large as they get, but no larger than `bytes` to be moved need.
/// Throws Device where not even the least fits.
Sizes size_lanes(std::uint64_t bytes, const shard::Budget& budget, const Options& options);

/// "GPUDirect Storage by …; n bytes read and m written so", or "pinned memory: why".
std::string storage_line(const DirectChoice& direct, const Shared& shared);

class Workers {
 public:
  /// `told` hears of source bytes that are done.
  Workers(const Sizes& sizes, const std::vector<int>& devices, const shard::Budget& budget, Shared& shared, std::function<void(std::uint64_t)> told);
  /// expand(i, open, full) adds the i-th of `count` things to the batch `open`, whatever thread it is; all are done on return.
  void run(std::size_t count, const std::function<void(std::size_t i, Batch& open, const Full& full)>& expand);

 private:
  struct Worker {
    std::vector<std::unique_ptr<Lane>> lanes;
    std::size_t next = 0;
    Batch open;
  };
  void start(Worker& worker, Batch& batch);
  /// Takes a worker's device for the calling thread.
  void enter(std::size_t worker) const { use_device(devices_[worker % devices_.size()]); }

  std::vector<int> devices_;
  const shard::Budget& budget_;
  std::function<void(std::uint64_t)> told_;
  std::vector<Worker> workers_;
};

}  // namespace gpu::reshard
