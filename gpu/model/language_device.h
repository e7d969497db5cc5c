// Devices for the ranks of a model: ops, weights and collectives that stay from checkpoint to checkpoint.
#pragma once

#include "lm/attention_backend.h"
#include "lm/device.h"

#include <memory>
#include <string>
#include <vector>

namespace gpu {

struct LanguageDeviceOptions {
  std::vector<int> devices;                          ///< rank r computes on devices[r mod their number]
  lm::AttentionBackend attention = lm::AttentionBackend::Auto;
  bool graphs = true;
  bool tf32 = false;                                 ///< as lm::Device::tf32()
  std::string cublaslt = {}, cudnn = {}, nccl = {};  ///< paths in place of the usual names
  /// How many bytes of each device may be taken; 0: nine tenths of what is free.
  std::uint64_t memory = 0;
};

/// Throws Device where there is none such.
std::unique_ptr<lm::Device> language_device(LanguageDeviceOptions options);

}  // namespace gpu
