// A build without CUDA: there is no device, and this is why.
#include "gpu/runtime.h"

namespace gpu {

Probe probe() { return {{}, "this build has no CUDA support (there was no nvcc)", {}}; }

}  // namespace gpu
