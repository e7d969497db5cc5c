// What was found of a checkpoint and does not stop a command that says something else on stdout.
#pragma once

#include "libshard/state_dict.h"

#include <vector>

namespace cli {

/// One line on stderr for each warning; errors have been refused before.
void warn_of(const std::vector<shard::Finding>& findings);

}  // namespace cli
