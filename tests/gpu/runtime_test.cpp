// The runtime: order, graphs, and the phases of a block.
#include "gpu/architectures.h"
#include "gpu/kernel.h"

#include <doctest/doctest.h>

#include <numeric>

namespace {

struct RowSum {
  static constexpr unsigned kThreads = 64;
  struct Shared {
    float part[kThreads];
  };
  struct Own {
    float sum;
  };
  const float* x;
  float* out;
  std::int64_t columns;
  template <typename Block>
  GPU_CODE void operator()(Block& block) const {
    block.each([&](unsigned thread, Own& own) {
      own.sum = 0;
      for (std::int64_t c = thread; c < columns; c += kThreads) own.sum += x[block.x() * columns + c];
    });
    block.sum(&Own::sum);
    block.each([&](unsigned thread, Own& own) {
      if (thread == 0) out[block.x()] = own.sum;
    });
  }
};

float* floats(const gpu::DeviceBuffer& buffer) { return reinterpret_cast<float*>(buffer.data()); }

}  // namespace

TEST_CASE("a kernel's blocks and phases") {
  gpu::Stream stream;
  std::vector<float> x(3 * 100), out(3, -1);
  std::iota(x.begin(), x.end(), 0.0f);
  const gpu::DeviceBuffer in(x.size() * 4), sums(3 * 4);
  gpu::to_device(in.data(), x.data(), x.size() * 4, stream);
  gpu::launch(stream, {3}, RowSum{floats(in), floats(sums), 100});
  gpu::to_host(out.data(), sums.data(), 12, stream);
  stream.wait();
  CHECK(out == std::vector<float>{4950, 14950, 24950});
}

TEST_CASE("a graph does its work again, on what the buffers hold by then") {
  gpu::Stream stream;
  std::vector<float> x(100, 1.0f), out(1);
  const gpu::DeviceBuffer in(400), sum(4);
  gpu::Graph::begin(stream);
  gpu::launch(stream, {1}, RowSum{floats(in), floats(sum), 100});
  const auto graph = gpu::Graph::end(stream);
  for (const float value : {1.0f, 2.0f}) {
    x.assign(100, value);
    gpu::to_device(in.data(), x.data(), 400, stream);
    graph.launch(stream);
    gpu::to_host(out.data(), sum.data(), 4, stream);
    stream.wait();
    CHECK(out[0] == 100 * value);
  }
}

TEST_CASE("an event orders two streams") {
  gpu::Stream first, second;
  gpu::Event ready;
  std::vector<float> x(100, 1.0f), out(1);
  const gpu::DeviceBuffer in(400), sum(4);
  gpu::to_device(in.data(), x.data(), 400, first);
  ready.record(first);
  ready.hold(second);
  gpu::launch(second, {1}, RowSum{floats(in), floats(sum), 100});
  gpu::to_host(out.data(), sum.data(), 4, second);
  second.wait();
  CHECK(out[0] == 100);
}

TEST_CASE("launches that no device takes are refused") {
  gpu::Stream stream;
  CHECK_THROWS_AS(gpu::launch(stream, {1, 70000}, RowSum{}), shard::Error);
  gpu::launch(stream, {0}, RowSum{});
  CHECK_THROWS_AS(gpu::DeviceBuffer(std::size_t{1} << 50), shard::Error);
}

TEST_CASE("which devices a list of architectures has code for") {
  constexpr auto* kBuild = "80-real,90a-real,100-real,100-virtual";
  CHECK_FALSE(gpu::has_code(kBuild, 7, 5));
  CHECK(gpu::has_code(kBuild, 8, 0));
  CHECK(gpu::has_code(kBuild, 8, 9));          // 8.x runs what was made for 8.0
  CHECK(gpu::has_code(kBuild, 9, 0));
  CHECK_FALSE(gpu::has_code("80-real,90a-real", 9, 1));  // 90a is for 9.0 alone
  CHECK(gpu::has_code(kBuild, 12, 0));         // by the driver, from 100-virtual
  CHECK_FALSE(gpu::has_code("80-real,90-real", 10, 0));
  CHECK(gpu::has_code("75", 12, 0));           // both code and what the driver takes
  CHECK_FALSE(gpu::has_code("", 9, 0));
}
