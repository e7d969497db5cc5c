// The host computes attention one way; devices have a choice.
#include "cli/model_device.h"

#include "cli/device.h"
#include "gpu/model/language_device.h"
#include "libshard/error.h"
#include "lm/attention_backend.h"

#include <cstdlib>

namespace cli {
namespace {

using lm::AttentionBackend;

AttentionBackend backend_of(const std::string& text) {
  static const std::map<std::string, AttentionBackend> known{{"auto", AttentionBackend::Auto}, {"local", AttentionBackend::Local}, {"flash", AttentionBackend::Flash}, {"fused", AttentionBackend::Fused}, {"unfused", AttentionBackend::Unfused}};
  const auto found = known.find(text);
  shard::require(found != known.end(), shard::Code::Usage, [&] { return fmt::format("--attention-backend {}: auto, local, flash, fused and unfused are known", text); });
  return found->second;
}

void check_environment(AttentionBackend backend) {
  lm::Environment already;
  for (const auto* name : {"NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"})
    if (const char* value = std::getenv(name)) already[name] = value;
  lm::attention_backend_environment(backend, std::nullopt, already);
}

}  // namespace

ModelDevice model_device(const RunOptions& run, const DeviceChoice& choice, std::optional<int> local_rank) {
  const auto backend = backend_of(choice.attention);
  if (backend != AttentionBackend::Auto) check_environment(backend);
  const auto where = choose_device(run.device);
  if (where.cuda.empty()) {
    shard::require(backend == AttentionBackend::Auto || backend == AttentionBackend::Local, shard::Code::Device,
                   [&] { return fmt::format("--attention-backend {}: is there on CUDA devices; the CPU computes attention as 'local' says", choice.attention); });
    shard::require(!choice.tf32, shard::Code::Device, [] { return std::string("--tf32: is there on CUDA devices; the CPU multiplies f32 as they are"); });
    return {lm::host_device(), where.why};
  }
  gpu::LanguageDeviceOptions options;
  options.attention = backend;
  options.tf32 = choice.tf32;
  options.memory = run.device_limit();
  options.devices = where.cuda;
  if (local_rank) options.devices = {options.devices[static_cast<std::size_t>(*local_rank) % options.devices.size()]};
  return {gpu::language_device(std::move(options)), where.why};
}

void DeviceChoice::add_to(CLI::App& command) {
  command.add_option("--attention-backend", attention, "auto, local, flash, fused or unfused (default auto)")->type_name("NAME");
  command.add_flag("--tf32", tf32, "f32 products on a device may keep ten bits of mantissa; judged as bf16 is");
}

}  // namespace cli
