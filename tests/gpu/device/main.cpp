// The tests of tests/gpu on a device; skipped, with the reason, where none is.
#define DOCTEST_CONFIG_IMPLEMENT
#include "gpu/runtime.h"

#include <doctest/doctest.h>

#include <cstdio>

int main(int count, char** words) {
  const auto found = gpu::probe();
  if (found.devices.empty()) {
    std::printf("skipped: %s\n", found.why.c_str());
    return 77;
  }
  const auto& device = found.devices[0];
  std::printf("on %s, compute capability %d.%d\n", device.name.c_str(), device.major, device.minor);
  return doctest::Context(count, words).run();
}
