// Where a model runs: --device and --attention-backend of the commands that compute.
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

/// run.device as choose_device takes it; "cuda" gives ranks all devices that are there. `attention`: "auto", "local", "flash", "fused" or
/// "unfused", checked against Transformer Engine's switches in the environment as Megatron does. Throws Usage, Device, Mismatch.
/// `local_rank`: this process is one of several on its host, and "cuda" is its own device alone.
ModelDevice model_device(const RunOptions& run, const std::string& attention, std::optional<int> local_rank = std::nullopt);

void add_attention_option(CLI::App& command, std::string& attention);

}  // namespace cli
