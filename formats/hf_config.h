// What transformers' forward pass would do, read from a config.json in its 4.x or 5.x spelling.
#pragma once

#include "libshard/transformer_config.h"

#include <nlohmann/json.hpp>

#include <string_view>

namespace formats {

/// Whether the model_type is one whose forward pass is known.
bool knows_model(const nlohmann::json& config);

/// Fields that are absent have the default of their model_type's class. Throws BadFormat naming `where` and the model_type
/// or field that is not understood.
shard::TransformerConfig hf_model_config(const nlohmann::json& config, std::string_view where);

}  // namespace formats
