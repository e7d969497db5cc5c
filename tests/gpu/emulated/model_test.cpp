// The language module with the libraries' doubles, on several devices.
#include "gpu/emulated/device.h"
#include "gpu/model/load_weights.h"
#include "libshard/error.h"
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
    for (const auto compute : {Compute::F32, Compute::Bf16, Compute::Fp8})
      for (const auto attention : {AttentionBackend::Auto, AttentionBackend::Unfused}) {
        CAPTURE(std::string(name));
        const Model model(name);
        const auto device = gpu::language_device({.devices = {0}, .attention = attention, .cublaslt = cublaslt});
        const auto host = model.on_host({.compute = compute, .threads = 1}), found = model.run(*device, {.compute = compute, .threads = 1});
        CHECK(device->notes()[0].starts_with("products by cuBLASLt"));
        // In bf16 and fp8 a token may go to another expert and its loss anywhere.
        if (compute == Compute::F32) CHECK(furthest(host.result.main.all, found.result.main.all) < 1e-5 * std::max(1.0, host.result.peak_logit));
        else CHECK(std::abs(mean(host.result.main.all) - mean(found.result.main.all)) < (compute == Compute::Bf16 ? 4e-2 : 0.15));
      }
}

TEST_CASE("ranks on devices of their own talk by NCCL, with the bits of ranks that talk through the host") {
  const auto nccl = doubles::path_of("libfake_nccl.so");
  for (const auto* name : {"hf/llama_untied_bf16", "hf/qwen3_moe_bf16", "hf/deepseek_v3_mtp_bf16"})
    for (const auto compute : {Compute::F32, Compute::Bf16, Compute::Fp8}) {
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

TEST_CASE("f32 products lose mantissa where TF32 is asked for, and only there") {
  const auto cublaslt = doubles::path_of("libfake_cublaslt.so");
  const Model model("hf/llama_untied_bf16");
  const auto host = model.on_host({.compute = Compute::F32, .threads = 1});
  for (const bool tf32 : {false, true}) {
    const auto device = gpu::language_device({.devices = {0}, .tf32 = tf32, .cublaslt = cublaslt});
    const auto apart = furthest(host.result.main.all, model.run(*device, {.compute = Compute::F32, .threads = 1}).result.main.all);
    CHECK(device->tf32() == tf32);
    CHECK((device->notes()[0].find("TF32") != std::string::npos) == tf32);
    if (tf32) CHECK((apart > 1e-4 && apart < 0.1));
    else CHECK(apart < 1e-4);
  }
}

TEST_CASE("NCCL's buffers are planned for, and not twice where they are there already") {
  const auto nccl = doubles::path_of("libfake_nccl.so");
  const Model model("hf/llama_untied_bf16");
  const RunOptions options{.compute = Compute::F32, .tensor_parallel = 2, .threads = 1};
  const SeveralDevices two(2);
  const auto all = [&](std::uint64_t memory) {
    const auto device = gpu::language_device({.devices = {0, 1}, .nccl = nccl, .memory = memory});
    for (int turn = 0; turn < 2; ++turn) model.run(*device, options);
  };
  all(std::uint64_t{600} << 20);
  CHECK_THROWS_WITH_AS(all(std::uint64_t{256} << 20), doctest::Contains("for libraries"), shard::Error);
}

TEST_CASE("each weight is read by one rank, and its boxes travel to the others in batches") {
  const auto path = doubles::path_of("libfake_nccl.so");
  const gpu::Nccl nccl(path);
  for (const auto* name : {"hf/gpt2_tied_f32", "hf/gpt_oss_bf16", "hf/deepseek_v3_mtp_bf16"})
    for (const int ranks : {2, 3})
      for (const std::size_t batch : {std::size_t{1}, std::size_t{20'000}, gpu::kLoadBatch}) {
        CAPTURE(std::string(name));
        const Model model(name);
        const formats::LocalReader reader(model.checkpoint.logical, model.checkpoint.files);
        WeightSource source(reader, formats::kernels(), Compute::Bf16);
        const auto nowhere = host_device();
        nowhere->prepare({}, model.config, {});
        Group alone(1);
        LocalComm comm(alone, 0);
        StagePlan plan;
        plan.uses = LanguageModule(model.config, source, placement_of(model.config, 0, 1), comm, comm, nowhere->ops(0, 0)).weight_uses(0, true);
        for (auto& use : plan.uses) use.times = 1;  // a second reader would be refused
        plan.readers = readers_of(source, plan.uses, ranks);
        for (int r = 0; r < ranks; ++r) plan.parts.push_back(parts_of(model.config, source, plan.uses, {r, ranks}));
        WeightStream stream(source, plan.uses, 1 << 20, nullptr);
        const auto id = nccl.make_id();
        std::mutex mutex;
        std::vector<std::string> wrong;
        run_ranks(ranks, [] {}, [&](int r) {
          gpu::Stream on;
          gpu::Communicator peers(nccl, id, r, ranks, 0);
          gpu::Resident held;
          held.hold(plan.parts[static_cast<std::size_t>(r)], on);
          load_weights(stream, plan, r, held, &peers, on, batch);
          for (const auto& [weight, part] : plan.parts[static_cast<std::size_t>(r)]) {
            std::vector<std::byte> found(part.bytes()), wanted;
            gpu::to_host(found.data(), held.view(weight).data, found.size(), on);
            gpu::wait(on);
            const auto whole = source.read(weight).column_range(part.box.lo[1], part.box.size[1]).row_range(part.box.lo[0], part.box.size[0]);
            for (Index row = 0; row < whole.rows; ++row) {
              const auto* const first = whole.row_range(row, 1).data;
              wanted.insert(wanted.end(), first, first + static_cast<std::size_t>(whole.columns) * size_of(whole.dtype));
            }
            const std::lock_guard lock(mutex);
            if (found != wanted) wrong.push_back(weight);
          }
        });
        CHECK(wrong == std::vector<std::string>{});
      }
}

namespace {

/// A checkpoint that can be read so often.
struct Broken : shard::Reader {
  const shard::Reader& whole;
  mutable std::atomic<int> reads_left;
  Broken(const shard::Reader& whole, int reads) : whole(whole), reads_left(reads) {}
  const shard::ShardedStateDict& describe() const override { return whole.describe(); }
  std::optional<shard::FileRange> file_range(std::uint32_t) const override { return std::nullopt; }
  void read(std::uint32_t stream, std::uint64_t offset, std::span<std::byte> into) const override {
    if (reads_left-- <= 0) shard::fail(shard::Code::Io, "a broken disk");
    whole.read(stream, offset, into);
  }
};

}  // namespace

TEST_CASE("a rank that fails while weights travel ends all, with its own error; the next run goes well") {
  const Model model("hf/llama_untied_bf16");
  const formats::LocalReader reader(model.checkpoint.logical, model.checkpoint.files);
  const SeveralDevices four(4);
  const auto device = gpu::language_device({.devices = {0, 1, 2, 3}, .nccl = doubles::path_of("libfake_nccl.so")});
  const RunOptions options{.compute = Compute::F32, .tensor_parallel = 2, .pipeline_parallel = 2, .threads = 1};
  for (const int reads : {0, 7, 12}) {
    const Broken broken(reader, reads);
    CHECK_THROWS_WITH_AS(run_model(broken, formats::kernels(), model.config, {model.batch, model.steps, 200, 200, {}, true}, options, *device), "a broken disk", shard::Error);
  }
  CHECK(model.run(*device, options).result.main.all.size() == 38);
}

namespace {

/// Processes that are played by threads.
struct Played {
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<std::string> texts, shown;
  std::size_t arrived = 0, round = 0;
  explicit Played(int size) : texts(static_cast<std::size_t>(size)) {}
};
struct PlayedProcess : Processes {
  Played& all;
  int mine;
  PlayedProcess(Played& all, int rank) : all(all), mine(rank) {}
  int rank() const override { return mine; }
  int size() const override { return static_cast<int>(all.texts.size()); }
  std::vector<std::string> all_gather(std::string_view text) override {
    std::unique_lock lock(all.mutex);
    all.texts[static_cast<std::size_t>(mine)] = text;
    const auto now = all.round;
    if (++all.arrived == all.texts.size()) {
      all.shown = all.texts;
      all.arrived = 0;
      ++all.round;
      all.changed.notify_all();
    } else {
      all.changed.wait(lock, [&] { return all.round != now; });
    }
    return all.shown;
  }
};

}  // namespace

TEST_CASE("ranks that are processes all give the report of ranks that are threads, and read each weight once between them") {
  const auto nccl = doubles::path_of("libfake_nccl.so");
  const SeveralDevices four(4);
  for (const auto* name : {"hf/gpt2_tied_f32", "hf/deepseek_v3_mtp_bf16"}) {
    const Model model(name);
    RunOptions options{.compute = Compute::Bf16, .tensor_parallel = 2, .pipeline_parallel = 2, .threads = 1};
    const auto threads = model.run(*gpu::language_device({.devices = {0, 1, 2, 3}, .nccl = nccl}), options);
    Played played(4);
    std::vector<RunReport> found(4);
    run_ranks(4, [] {}, [&](int r) {
      PlayedProcess process(played, r);
      auto mine = options;
      mine.processes = &process;
      found[static_cast<std::size_t>(r)] = model.run(*gpu::language_device({.devices = {r}, .nccl = nccl}), mine);
    });
    for (const auto& one : found) {
      CHECK(one.result.main.all == threads.result.main.all);
      CHECK(one.result.peak_logit == threads.result.peak_logit);
      CHECK(one.bytes_read == threads.bytes_read);
      CHECK(one.findings.size() == threads.findings.size());
      REQUIRE(one.result.hidden.size() == threads.result.hidden.size());
      for (std::size_t i = 0; i < one.result.hidden.size(); ++i) CHECK(one.result.hidden[i].digest == threads.result.hidden[i].digest);
      REQUIRE(one.weights.size() == threads.weights.size());
      for (std::size_t i = 0; i < one.weights.size(); ++i) CHECK(one.weights[i].rms == threads.weights[i].rms);
    }
  }
}

TEST_CASE("processes that share a device, or have no NCCL, are refused on all of them") {
  const Model model("hf/llama_untied_bf16");
  const auto refusals = [&](const std::string& nccl) {
    Played played(2);
    std::vector<std::string> out(2);
    run_ranks(2, [] {}, [&](int r) {
      PlayedProcess process(played, r);
      try {
        model.run(*gpu::language_device({.devices = {0}, .nccl = nccl}), {.tensor_parallel = 2, .threads = 1, .processes = &process});
      } catch (const shard::Error& error) {
        out[static_cast<std::size_t>(r)] = error.what();
      }
    });
    CHECK(out[0] == out[1]);
    return out[0];
  };
  CHECK(refusals(doubles::path_of("libfake_nccl.so")).find("several processes talk by NCCL: ranks 0 and 1 share EMULATED-") == 0);
  CHECK(refusals("/nowhere/libnccl.so").find("several processes talk by NCCL: rank 0 has no NCCL (NCCL: could not be loaded") == 0);
}

#endif
