// The environment that Megatron's choice of an attention backend asks for, as a pure function.
#pragma once

#include <map>
#include <optional>
#include <string>

namespace lm {

enum class AttentionBackend { Flash = 1, Fused, Unfused, Local, Auto };

using Environment = std::map<std::string, std::string>;

/// The variables to be set for `backend` (and a FlashAttention version, 2 to 4) given those already set. Throws Mismatch
/// where one is set to something else, as Megatron asserts. Source: language_module.py, _set_attention_backend.
Environment attention_backend_environment(AttentionBackend backend, std::optional<int> flash_attention_version, const Environment& already);

}  // namespace lm
