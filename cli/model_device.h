// Where and how a model runs: --device, --attention-backend and --tf32 of the commands that compute.
#pragma once

#include "cli/options.h"
#include "lm/device.h"

#include <CLI/CLI.hpp>

#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace cli {

struct ModelDevice {
  std::unique_ptr<lm::Device> device;
  std::string why;                             ///< the choice of the device: "asked for", "auto: …"
};

/// What devices leave open.
struct DeviceChoice {
  std::string attention = "auto";              ///< or "local", "flash", "fused", "unfused"
  bool tf32 = false;
  void add_to(CLI::App& command);
};

/// run.device as choose_device takes it; "cuda" gives ranks all devices that are there. An attention backend is checked against Transformer Engine's
/// switches in the environment as Megatron does. Throws Usage, Device, Mismatch.
/// `local_rank`: this process is one of several on its host, and "cuda" is its own device alone.
ModelDevice model_device(const RunOptions& run, const DeviceChoice& choice, std::optional<int> local_rank = std::nullopt);

}  // namespace cli
