// Which layers slide, and how positions rotate: config.json's many spellings read into one.
#pragma once

#include "formats/hf/family.h"

#include <optional>
#include <string>
#include <vector>

namespace formats::hf {

/// A field that may be absent or null.
const nlohmann::ordered_json* field(const nlohmann::ordered_json& config, const char* name);
double number(const nlohmann::ordered_json& config, const char* name, double otherwise);

/// Whether rotary embedding may turn a part of each head: the family's defaults name the field that says which.
bool turns_parts(const Family& family);

/// config.json over the family's defaults.
nlohmann::ordered_json with_defaults(const Family& family, const nlohmann::ordered_json& config);

/// The window of sliding layers (W keys, the own one among them) and which layers slide; nullopt where none does.
struct Window {
  shard::Index size;
  std::vector<bool> slides;
};
std::optional<Window> window_of(const Family& family, const nlohmann::ordered_json& config, shard::Index layers);

/// Rotary embedding, from rope_parameters (transformers 5) or rope_theta and rope_scaling (4).
struct Rope {
  double base = 10000, percent = 1;
  std::string type = "default";
  nlohmann::ordered_json scaling;  ///< the object that holds factor and the like; may be empty
};
Rope rope_of(const Family& family, const nlohmann::ordered_json& config);

}  // namespace formats::hf
