// Names of modules before Megatron-Core ("language_model.encoder…") and prefixes of wrappers, in today's spelling.
#pragma once

#include <string>
#include <string_view>

namespace formats::megatron {

/// The name that the local spec of Megatron-Core gives the same parameter; today's names come back unchanged.
std::string modern_name(std::string_view key);

}  // namespace formats::megatron
