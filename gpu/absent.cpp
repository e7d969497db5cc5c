// A build without CUDA: there is no device, and this is why.
#include "gpu/model/language_device.h"
#include "gpu/runtime.h"
#include "libshard/error.h"

namespace gpu {

Probe probe() { return {{}, "this build has no CUDA support (there was no nvcc)", {}}; }

std::unique_ptr<LanguageDevice> language_device(LanguageDeviceOptions) { shard::fail(shard::Code::Device, "device: {}", probe().why); }

}  // namespace gpu
