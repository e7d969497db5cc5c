// What tests may ask of the emulated device: to be several, less memory, a loss, slowness, direct storage.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>

namespace gpu {

struct Emulated {
  int devices = 1;                                     ///< each with memory of its own
  std::size_t memory = std::size_t{8} << 30;           ///< bytes; at most the default
  std::uint64_t lost_after = UINT64_MAX;               ///< pieces of work that go well before the device is lost for good
  std::chrono::microseconds pause{0};                  ///< before each piece of work
  bool direct = false;                                 ///< files are read into device memory
};
void emulate(const Emulated& device);
Emulated emulated();

}  // namespace gpu
