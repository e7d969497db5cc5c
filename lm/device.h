// What the ranks of a model run on. It outlives runs, so that a resident server keeps memory, recorded work and libraries.
#pragma once

#include "lm/ops.h"
#include "lm/weights.h"

#include <memory>
#include <string>
#include <vector>

namespace lm {

/// How a model is cut and computed.
struct Ranks {
  int tensor = 1, pipeline = 1;
  Compute compute = Compute::F32;
  unsigned threads = 1;                        ///< of the host, for each rank
};

/// What a stage will hold and compute: known before anything is read.
struct StagePlan {
  std::vector<WeightUse> uses;
  std::uint64_t weight_bytes = 0;              ///< as products take them
  Index rows = 0;                              ///< batch·length of the largest pass
};

class Device {
 public:
  virtual ~Device() = default;
  /// "cpu", or which card.
  virtual std::string name() const = 0;
  /// Readies for these stages, before anything is read. Throws Device where they do not fit, saying what is missing and what would fit.
  virtual void prepare(const Ranks& ranks, const shard::TransformerConfig& config, const std::vector<StagePlan>& stages) = 0;
  /// Whether weights stay on the device, each read once, rather than pass by as layers take them.
  virtual bool resident() const = 0;
  virtual Ops& ops(int stage, int tensor_rank) = 0;
  /// This rank's end of a group of the process's ranks.
  virtual std::unique_ptr<Comm> comm(Group& group, int member, int stage, int tensor_rank) = 0;
  /// The stage's weights for that rank; where resident, all of `stream` is brought to the device first. Valid until the next run's.
  virtual Weights& weights(WeightStream& stream, int stage, int tensor_rank) = 0;
};

/// The host's memory and threads; one for each run.
std::unique_ptr<Device> host_device();

}  // namespace lm
