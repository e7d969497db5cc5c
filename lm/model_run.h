// A checkpoint's forward pass on ranks that are threads or processes, each with its place on a device: the whole of what `validate` and a resident server ask for.
#pragma once

#include "lm/device.h"
#include "lm/language_module.h"

namespace lm {

struct RunOptions {
  Compute compute = Compute::F32;
  int tensor_parallel = 1, pipeline_parallel = 1;
  unsigned threads = 1;                        ///< of all ranks together
  std::uint64_t memory = 256ull << 20;         ///< for weights that are read and not yet let go
  const std::atomic<bool>* stop = nullptr;
  Processes* processes = nullptr;              ///< that are the ranks; none: ranks are threads of this one
};

struct RunReport {
  ForwardResult result;
  std::vector<shard::Finding> findings;        ///< of weights: checksums, numbers
  std::vector<WeightStats> weights;
  std::uint64_t bytes_read = 0;
  double seconds = 0, load_seconds = 0;        ///< of all, and of that a stage's ranks waited for weights, looked at them and brought them to their device
};

/// Throws Mismatch where weights and configuration do not fit, BadLayout for layouts that the model cannot have. Results are
/// the same for every number of threads, and for one rank the same for every format and layout of the checkpoint. Ranks that are processes all return
/// the same report; on_logits sees the logits of this process's rank alone.
RunReport run_model(const shard::Reader& from, const shard::Kernels& kernels, const shard::TransformerConfig& config, const ForwardRequest& request,
                    const RunOptions& options, Device& device);

}  // namespace lm
