// A build without CUDA: there is no device, and this is why. What commands call on devices is never reached.
#include "gpu/model/language_device.h"
#include "gpu/reshard/execute.h"
#include "gpu/reshard/scan.h"
#include "gpu/runtime.h"
#include "libshard/error.h"

namespace gpu {
namespace {

constexpr const char* kWhy = "this build has no CUDA support (there was no nvcc)";

}  // namespace

Probe probe() { return {{}, kWhy, {}}; }

std::unique_ptr<lm::Device> language_device(LanguageDeviceOptions) { shard::fail(shard::Code::Device, "device: {}", kWhy); }

namespace reshard {

Outcome execute(const shard::Plan&, const shard::Reader&, shard::Writer&, const shard::Kernels&, const shard::Budget&, const Options&, const shard::Progress&) {
  shard::fail(shard::Code::Device, "device: {}", kWhy);
}
ScanOutcome scan_bytes(const shard::Reader&, const shard::ShardedStateDict&, const shard::Plan&, const shard::Kernels&, const shard::Budget&, const Options&, const shard::Progress&) {
  shard::fail(shard::Code::Device, "device: {}", kWhy);
}

}  // namespace reshard
}  // namespace gpu
