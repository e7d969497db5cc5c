// What a device does that has little memory, or is lost.
#include "gpu/emulated/device.h"
#include "gpu/kernel.h"
#include "gpu/reshard/execute.h"
#include "libshard/error.h"
#include "tests/libshard/random_checkpoint.h"

#include <doctest/doctest.h>

TEST_CASE("an emulated device has the memory it was given, and can be lost") {
  gpu::emulate({.memory = 1 << 20});
  {
    const gpu::DeviceBuffer half(512 << 10);
    CHECK(gpu::device_info(0).free == 512u << 10);
    CHECK_THROWS_WITH_AS(gpu::DeviceBuffer((512 << 10) + 1), "device: out of memory: 524289 bytes are asked for, 524288 of 1048576 are free", shard::Error);
  }
  gpu::emulate({.lost_after = 0});
  gpu::Stream stream;
  const gpu::DeviceBuffer buffer(16);
  gpu::set_bytes(buffer.data(), 0, 16, stream);
  CHECK_THROWS_AS(stream.wait(), shard::Error);
  gpu::emulate({});
}

TEST_CASE("resharding takes what is free, and says when its device is lost") {
  std::mt19937 random(1);
  testing::Memory source(testing::random_dict(random, false));
  source.fill(1);
  const auto layout = testing::random_dict(random, true);
  const auto plan = shard::make_plan(source.describe(), layout);
  testing::Memory target(layout);
  const auto budget = [](std::uint64_t memory) { return shard::Budget{8, memory, nullptr}; };
  gpu::emulate({.memory = 500'000});  // what is free bounds what is taken
  CHECK(gpu::reshard::execute(plan, source, target, formats::kernels(), budget(256 << 20), {.device_memory = 64 << 20}).sizes.device_memory <= 500'000);
  gpu::emulate({.lost_after = 5});
  CHECK_THROWS_WITH_AS(gpu::reshard::execute(plan, source, target, formats::kernels(), budget(1 << 20), {}), doctest::Contains("lost"), shard::Error);
  gpu::emulate({});
}
