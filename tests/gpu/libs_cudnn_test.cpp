// Fused attention: what is refused and why, and, where SHARDKIT_CUDNN names cuDNN's own library, that it has engines for what is not. No kernel runs here.
#include "gpu/libs/cublaslt.h"
#include "gpu/libs/cudnn.h"
#include "gpu/libs/nccl.h"
#include "libshard/error.h"

#include <doctest/doctest.h>

#include <cstdlib>

using shard::DType;

namespace {

/// q, k and v side by side in one product's output, as models have them.
gpu::AttentionShape shape(std::int64_t tokens, std::int64_t head_size) {
  gpu::AttentionShape s{.batch = 2, .heads = 32, .groups = 4, .queries = tokens, .keys = tokens, .head_size = head_size, .value_size = head_size};
  const auto row = (s.heads + 2 * s.groups) * head_size;
  s.q = s.k = s.v = {tokens * row, head_size, row};
  s.out = {tokens * s.heads * head_size, head_size, s.heads * head_size};
  return s;
}

struct Model {
  int version, multiprocessors, shared;
};

std::string properties(const Model& of) {
  return fmt::format(R"({{"deviceVer":{},"driverVer":13000,"cudaDeviceId":0,"totalGlobalMem":85899345920,"maxGridSize":[2147483647,65535,65535],"maxBlockSize":[1024,1024,64],)"
                     R"("regsPerBlock":65536,"multiProcessorCount":{},"smCountOrigin":0,"warpSize":32,"maxSharedMemoryPerBlock":49152,"maxSharedMemoryPerBlockOptin":{},)"
                     R"("oversizedSharedMemoryPerBlock":0,"reservedSharedMemoryPerBlock":1024,"maxRegistersPerSM":65536,"maxCtasPerSM":32,"maxThreadsPerBlock":1024,)"
                     R"("maxThreadsPerSM":2048,"pciDeviceId":9008,"isTccDriver":0,"supportCoopLaunch":1,"smClockRateKHz":1980000,"memClockRateKHz":2619000,)"
                     R"("l2CacheSize":52428800,"deviceName":"described"}})",
                     of.version, of.multiprocessors, of.shared);
}

const char* library(const char* variable) {
  const char* path = std::getenv(variable);
  return path && *path ? path : nullptr;
}

}  // namespace

TEST_CASE("fused attention refuses by name what cuDNN is not asked for") {
  CHECK(gpu::attention_refusal(shape(64, 128)) == "");
  const auto refused = [](auto change) {
    auto s = shape(64, 128);
    change(s);
    return gpu::attention_refusal(s);
  };
  CHECK(refused([](auto& s) { s.type = DType::F32; }) == "cuDNN's fused attention takes bf16 and f16, not f32");
  CHECK(refused([](auto& s) { s.softcap = 30; }) == "cuDNN's fused attention has no soft cap on its scores");
  CHECK(refused([](auto& s) { s.sinks = true; }) == "attention sinks are not given to cuDNN's fused attention");
  CHECK(refused([](auto& s) { s.value_size = 64; }) == "keys of 128 and values of 64 elements a head are not given to cuDNN's fused attention");
  CHECK(refused([](auto& s) { s.head_size = s.value_size = 512; }) == "cuDNN's fused attention takes heads of up to 256 elements that 8 divides, not 512");
  CHECK(refused([](auto& s) { s.head_size = s.value_size = 20; }) == "cuDNN's fused attention takes heads of up to 256 elements that 8 divides, not 20");
  CHECK(refused([](auto& s) { s.queries = 1; }) == "a causal mask over 1 queries and 64 keys is not given to cuDNN's fused attention");
  CHECK(refused([](auto& s) { s.causal = false, s.window = 8; }) == "a window without a causal mask is not given to cuDNN's fused attention");
  CHECK(refused([](auto& s) { s.groups = 5; }) == "32 heads cannot share 5 heads of keys");
  CHECK(refused([](auto& s) { s.batch = 0; }) == "there are no elements");
}

TEST_CASE("cuDNN has engines for the graph on A100, H100 and B200") {
  const auto* path = library("SHARDKIT_CUDNN");
  if (!path) {
    MESSAGE("not run: SHARDKIT_CUDNN names no libcudnn.so.9");
    return;
  }
  for (const auto& device : {Model{800, 108, 166912}, Model{900, 132, 232448}, Model{1000, 148, 232448}}) {
    CAPTURE(device.version);
    const auto engines = [&](auto change) {
      auto s = shape(2048, 64);
      change(s);
      return gpu::attention_engines_for(s, properties(device), path);
    };
    CHECK(engines([](auto&) {}) > 0);
    CHECK(engines([](auto& s) { s.window = 512; }) > 0);
    CHECK(engines([](auto& s) { s.causal = false; }) > 0);
    CHECK(engines([](auto& s) { s.causal = false, s.queries = 1; }) > 0);
    CHECK(engines([](auto& s) { s = shape(37, 64); }) > 0);
    CHECK(engines([](auto& s) { s = shape(2048, 128), s.type = DType::F16; }) > 0);
    CHECK(engines([](auto& s) { s = shape(512, 256); }) > 0);
    CHECK(engines([](auto& s) { s.groups = s.heads, s.k = s.v = s.q; }) > 0);
  }
}

TEST_CASE("the vendors' own libraries have every entry point that is called, and say why they do not start") {
  const auto said = [](const char* variable, const char* doing, auto start) {
    const auto* path = library(variable);
    if (!path) {
      MESSAGE("not run: " << std::string(variable) << " names no library");
      return;
    }
    try {
      start(path);
    } catch (const shard::Error& error) {  // a driver that is only a stub
      CHECK(error.code == shard::Code::Device);
      CHECK(std::string(error.what()).find(doing) != std::string::npos);
    }
  };
  said("SHARDKIT_CUBLASLT", "starting: ", [](const char* path) { gpu::Matmul(0, path); });
  said("SHARDKIT_CUDNN", "starting: ", [](const char* path) { gpu::FusedAttention(0, path); });
  said("SHARDKIT_NCCL", "rank 0 of 1 joins: ", [](const char* path) {
    const gpu::Nccl nccl(path);
    gpu::Communicator(nccl, nccl.make_id(), 0, 1, 0);
  });
}
