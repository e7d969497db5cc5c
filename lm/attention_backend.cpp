// Three switches of Transformer Engine, and one for each FlashAttention version that is not wanted.
#include "lm/attention_backend.h"

#include "libshard/error.h"

namespace lm {

Environment attention_backend_environment(AttentionBackend backend, std::optional<int> version, const Environment& already) {
  Environment out;
  const auto want = [&](const std::string& name, const char* value) {
    const auto set = already.find(name);
    shard::require(set == already.end() || set->second == value, shard::Code::Mismatch,
                   [&] { return fmt::format("{}: is set to '{}'; the attention backend needs '{}'", name, set->second, value); });
    out[name] = value;
  };
  const bool any = backend == AttentionBackend::Auto;
  want("NVTE_FLASH_ATTN", any || backend == AttentionBackend::Flash ? "1" : "0");
  want("NVTE_FUSED_ATTN", any || backend == AttentionBackend::Fused ? "1" : "0");
  want("NVTE_UNFUSED_ATTN", any || backend == AttentionBackend::Unfused ? "1" : "0");
  if (version)
    for (int other = 2; other <= 4; ++other)
      if (other != *version) want("NVTE_FLASH_ATTN_V" + std::to_string(other), "0");
  return out;
}

}  // namespace lm
