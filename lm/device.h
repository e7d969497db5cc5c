// What the ranks of a model run on. It outlives runs, so that a resident server keeps memory, recorded work and libraries.
#pragma once

#include "lm/ops.h"
#include "lm/parts.h"
#include "lm/processes.h"

#include <atomic>
#include <memory>
#include <string>
#include <vector>

namespace lm {

/// How a model is cut and computed.
struct Ranks {
  int tensor = 1, pipeline = 1;
  Compute compute = Compute::F32;
  unsigned threads = 1;                        ///< of the host, for each rank
  const std::atomic<bool>* stop = nullptr;     ///< ends what the host computes
  Processes* processes = nullptr;              ///< that are the ranks, this one among them; none: all ranks are threads of this process
  bool here(int rank) const { return !processes || processes->rank() == rank; }
};

/// What a stage will hold and compute: known before anything is read.
struct StagePlan {
  std::vector<WeightUse> uses;
  std::vector<WeightUse> tables;               ///< whose rows are picked by id, where they are not among `uses`
  std::vector<Parts> parts;                    ///< by tensor rank, of both
  std::vector<int> readers;                    ///< the tensor rank that brings each of the uses, then of the tables, where one does for all
  Index rows = 0;                              ///< batch·length of the largest pass
};

class Device {
 public:
  virtual ~Device() = default;
  /// "cpu", or which card.
  virtual std::string name() const = 0;
  /// What it chose, for people: products by which library, how ranks talk.
  virtual std::vector<std::string> notes() const { return {}; }
  /// Whether products in f32 may take their operands with ten bits of mantissa.
  virtual bool tf32() const { return false; }
  /// Readies for these stages, before anything is read. Throws Device where they do not fit, saying what is missing and what would fit.
  virtual void prepare(const Ranks& ranks, const shard::TransformerConfig& config, const std::vector<StagePlan>& stages) = 0;
  /// What the stage's ranks in this process together take from its stream there.
  virtual std::vector<WeightUse> takes(int stage) const = 0;
  // What follows is called on the rank's own thread.
  virtual Ops& ops(int stage, int tensor_rank) = 0;
  enum class Axis { Tensor, Pipeline };
  /// The rank's end of its group along `axis`; `group` joins those ranks as threads.
  virtual std::unique_ptr<Comm> comm(Group& group, Axis axis, int stage, int tensor_rank) = 0;
  /// A rank failed: whoever waits for it on the device must not. From any thread.
  virtual void fail() {}
  /// The stage's weights for that rank; a device that keeps them brings the rank's parts of all of `stream` to its memory first. Valid until the
  /// next run's.
  virtual Weights& weights(WeightStream& stream, int stage, int tensor_rank) = 0;
};

/// The host's memory and threads; one for each run.
std::unique_ptr<Device> host_device();

}  // namespace lm
