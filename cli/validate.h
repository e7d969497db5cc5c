// One validation: what can be asked of it, and the function that the command and the resident server share.
#pragma once

#include "cli/model_device.h"
#include "cli/options.h"
#include "cli/validate_report.h"

#include <optional>
#include <string>

namespace cli {

struct ValidateAsk {
  std::string path, reference, against, tokens, text, compute = "f32", html, junit;
  std::optional<double> max_loss;
  int tp = 1, pp = 1;
  DeviceChoice choice;
  ModelOptions model;
  RunOptions run;
};

/// Throws Usage for what no checkpoint could be judged by: two inputs, an unknown compute, a bound that is none. validate() asks it first.
void check_ask(const ValidateAsk& ask);

/// Opens, computes on `device`, judges; prints and writes nothing. Takes threads, memory and the stop flag from `budget`, not from `ask.run`.
/// With `processes` each is one rank, and all get the same. Throws shard::Error as `shardkit validate` ends; Io where the stop flag was set.
Validation validate(const ValidateAsk& ask, const shard::Budget& budget, lm::Device& device, lm::Processes* processes = nullptr);

}  // namespace cli
