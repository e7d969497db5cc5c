// The operator's command for a bad verdict.
#pragma once

#include "cli/serve/history.h"

#include <atomic>
#include <string>

namespace cli {

/// Runs `command` by /bin/sh with the record as JSON on stdin and SHARDKIT_VERDICT, SHARDKIT_CHECKPOINT, SHARDKIT_STATUS and
/// SHARDKIT_LOSS in its environment; names of checkpoints never become part of the command's text. Waits at most a minute, or
/// until `stop`, then kills it with what it started. Returns what went wrong, "" for nothing.
std::string run_on_bad(const std::string& command, const Record& record, const std::atomic<bool>& stop);

}  // namespace cli
