// Mistakes that leave every number in its place but change it: zeros, +1 norms, rounding, a constant factor.
#pragma once

#include "libshard/hints/rows.h"

namespace shard::hints {

/// Text, or "" where none of these mistakes explains the difference.
std::string explain_values(const Both& both, const Subject& subject, const Difference& difference);

}  // namespace shard::hints
