// Asks the runtime once; what it answers is the reason that is told.
#include "cli/device.h"

#include "gpu/runtime.h"
#include "libshard/error.h"

#include <charconv>
#include <optional>
#include <set>

namespace cli {
namespace {

using shard::Code;

struct Wanted {
  bool cuda = false, automatic = false;
  std::optional<int> index = {};
};

Wanted parse(const std::string& text) {
  if (text == "cpu") return {};
  if (text == "auto") return {.automatic = true};
  if (text == "cuda") return {.cuda = true};
  int index = 0;
  const bool numbered = text.starts_with("cuda:") && text.size() > 5;
  const auto* const end = text.data() + text.size();
  const auto [at, error] = numbered ? std::from_chars(text.data() + 5, end, index) : std::from_chars_result{text.data(), std::errc::invalid_argument};
  shard::require(error == std::errc() && at == end && index >= 0, Code::Usage, [&] { return fmt::format("--device {}: should be cpu, cuda, cuda:N or auto", text); });
  return {.cuda = true, .index = index};
}

Device on_cuda(const std::vector<gpu::DeviceInfo>& devices, std::string why) {
  Device out{{}, {}, {}, std::move(why)};
  std::set<std::string> models;
  for (const auto& info : devices) {
    out.cuda.push_back(info.index);
    out.name += fmt::format("{}cuda:{}", out.name.empty() ? "" : ", ", info.index);
    if (models.insert(info.name).second) out.model += (out.model.empty() ? "" : ", ") + info.name;
  }
  return out;
}

}  // namespace

Device choose_device(const std::string& text) {
  const auto wanted = parse(text);
  if (!wanted.cuda && !wanted.automatic) return {{}, "cpu", "", "asked for"};
  const auto [devices, why, refused] = gpu::probe();
  if (wanted.automatic) {
    if (devices.empty()) return {{}, "cpu", "", "auto: " + why};
    return on_cuda({devices.front()}, devices.size() == 1 ? "auto: the one device that is here" : fmt::format("auto: the first of {} devices", devices.size()));
  }
  if (wanted.index)
    if (const auto bad = refused.find(*wanted.index); bad != refused.end()) shard::fail(Code::Device, "--device {}: {}", text, bad->second);
  shard::require(!devices.empty(), Code::Device, [&] { return fmt::format("--device {}: {}; cpu is there", text, why); });
  if (!wanted.index) return on_cuda(devices, "asked for");
  for (const auto& info : devices)
    if (info.index == *wanted.index) return on_cuda({info}, "asked for");
  std::string there;
  for (const auto& info : devices) there += fmt::format("{}cuda:{}", there.empty() ? "" : ", ", info.index);
  shard::fail(Code::Device, "--device {}: there is no such device; {} {}", text, there, devices.size() == 1 ? "is there" : "are there");
}

void require_cpu(const std::string& text) {
  shard::require(!parse(text).cuda, Code::Device, [&] { return fmt::format("--device {}: this command does not run on CUDA devices yet; cpu is there", text); });
}

}  // namespace cli
