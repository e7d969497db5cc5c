// The emulated device of shardkit_emulated is as tests say in the environment.
#include "gpu/emulated/device.h"

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
  return true;
}();

}  // namespace
