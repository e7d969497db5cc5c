// The commands: each adds itself to the parser and returns its exit status.
#pragma once

#include <CLI/CLI.hpp>

#include <functional>

namespace cli {

/// What a command does once its options are read.
using Action = std::function<int()>;

void add_inspect(CLI::App& app, Action& action);
void add_convert(CLI::App& app, Action& action);  ///< reshard, convert, plan
void add_verify(CLI::App& app, Action& action);
void add_hash(CLI::App& app, Action& action);
void add_diff(CLI::App& app, Action& action);
void add_families(CLI::App& app, Action& action);
void add_validate(CLI::App& app, Action& action);
void add_serve(CLI::App& app, Action& action);
void add_scan(CLI::App& app, Action& action);

}  // namespace cli
