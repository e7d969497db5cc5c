// The language module with the libraries' doubles, on several devices.
#include "gpu/emulated/device.h"
#include "tests/gpu/emulated/doubles.h"
#include "tests/gpu/model.h"

using namespace lm;
using namespace models;

namespace {

struct SeveralDevices {
  explicit SeveralDevices(int count) : before(gpu::emulated()) {
    auto more = before;
    more.devices = count;
    gpu::emulate(more);
  }
  ~SeveralDevices() { gpu::emulate(before); }
  gpu::Emulated before;
};

}  // namespace

#ifdef SHARDKIT_FAKE_LIBS

TEST_CASE("products through cuBLASLt's double give the host's losses") {
  const auto cublaslt = doubles::path_of("libfake_cublaslt.so");
  for (const auto* name : {"hf/gpt2_tied_f32", "hf/gemma2_tied_bf16", "hf/gpt_oss_bf16", "hf/deepseek_v3_mtp_bf16", "hf/qwen3_moe_bf16"})
    for (const auto compute : {Compute::F32, Compute::Bf16})
      for (const auto attention : {AttentionBackend::Auto, AttentionBackend::Unfused}) {
        CAPTURE(std::string(name));
        const Model model(name);
        const auto device = gpu::language_device({.devices = {0}, .attention = attention, .cublaslt = cublaslt});
        const auto host = model.on_host({.compute = compute, .threads = 1}), found = model.run(*device, {.compute = compute, .threads = 1});
        CHECK(device->notes()[0].starts_with("products by cuBLASLt"));
        // In bf16 a token may go to another expert and its loss anywhere.
        if (compute == Compute::F32) CHECK(furthest(host.result.main.all, found.result.main.all) < 1e-5 * std::max(1.0, host.result.peak_logit));
        else CHECK(std::abs(mean(host.result.main.all) - mean(found.result.main.all)) < 4e-2);
      }
}

TEST_CASE("ranks on devices of their own talk by NCCL, with the bits of ranks that talk through the host") {
  const auto nccl = doubles::path_of("libfake_nccl.so");
  for (const auto* name : {"hf/llama_untied_bf16", "hf/qwen3_moe_bf16", "hf/deepseek_v3_mtp_bf16"})
    for (const auto compute : {Compute::F32, Compute::Bf16}) {
      CAPTURE(std::string(name));
      const Model model(name);
      const RunOptions options{.compute = compute, .tensor_parallel = 2, .pipeline_parallel = 2, .threads = 1};
      const auto staged = model.run(*gpu::language_device({.devices = {0}}), options);
      const SeveralDevices four(4);
      const auto device = gpu::language_device({.devices = {0, 1, 2, 3}, .nccl = nccl});
      for (int turn = 0; turn < 2; ++turn) {
        const auto found = model.run(*device, options);
        CHECK(device->notes().back().starts_with("ranks talk by NCCL"));
        CHECK(found.result.main.all == staged.result.main.all);
        REQUIRE(found.result.hidden.size() == staged.result.hidden.size());
        for (std::size_t i = 0; i < found.result.hidden.size(); ++i) CHECK(found.result.hidden[i].digest == staged.result.hidden[i].digest);
      }
    }
}

#endif
