// The emulated device of shardkit_emulated is as tests say in the environment.
#include "gpu/emulated/device.h"
#include "gpu/kernel.h"
#include "tests/gpu/emulated/fake_libs/fake.h"

#include <dlfcn.h>

#include <cstdlib>
#include <string>

namespace {

std::uint64_t number(const char* name, std::uint64_t otherwise) {
  const char* text = std::getenv(name);
  return text ? std::stoull(text) : otherwise;
}

const bool set = [] {
  gpu::Emulated device;
  device.devices = static_cast<int>(number("SHARDKIT_EMULATED_DEVICES", 1));
  device.memory = number("SHARDKIT_EMULATED_MEMORY", device.memory);
  device.lost_after = number("SHARDKIT_EMULATED_LOST_AFTER", device.lost_after);
  device.pause = std::chrono::microseconds(number("SHARDKIT_EMULATED_PAUSE_US", 0));
  device.direct = number("SHARDKIT_EMULATED_DIRECT", 0) != 0;
  gpu::emulate(device);
  // The double of NCCL (tests/gpu/emulated/fake_libs), whose soname is NCCL's own: whoever loads NCCL by its usual name finds it.
  if (const char* nccl = std::getenv("SHARDKIT_EMULATED_NCCL"); nccl && *nccl) {
    void* const library = ::dlopen(nccl, RTLD_NOW | RTLD_LOCAL);
    if (!library) std::abort();
    *static_cast<FakeEnqueue*>(::dlsym(library, "fake_enqueue")) = [](void* stream, std::function<void()> work) { gpu::enqueue({stream}, std::move(work)); };
    *static_cast<FakeWait*>(::dlsym(library, "fake_wait")) = gpu::let_others_work;
  }
  return true;
}();

}  // namespace
