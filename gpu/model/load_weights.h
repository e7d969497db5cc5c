// A stage's weights on their way from a checkpoint to the device memory of the ranks that hold parts of them.
#pragma once

#include "gpu/model/resident.h"
#include "lm/weights.h"

#include <vector>

namespace gpu {

/// Takes every use from `stream` once, in order, and sends what `to` holds of it there. Returns when all is there.
void load_weights(lm::WeightStream& stream, const std::vector<lm::WeightUse>& uses, Resident& to, StreamView on);

}  // namespace gpu
