// A Hugging Face model family as data: which config.json it speaks for, how its tensors are spelled and lie, and how its
// settings are called in Megatron's args. The built-in ones are the JSON files in families/; a user's file has the same
// form (docs/formats/families.md).
#pragma once

#include "libshard/family.h"

#include <nlohmann/json.hpp>

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

namespace formats::hf {

struct Family {
  std::string name, about, architecture;
  std::vector<std::string> model_types;
  std::string recognise;                  ///< condition over Megatron's parameters; "" : never without being named
  std::vector<shard::Row> rows;           ///< dialect letter 'h'
  std::vector<std::string> drop;          ///< globs of keys that are no weights
  std::string prefix;                     ///< older files leave it out
  std::string window, sparse_layers;      ///< which rule says the layers that slide, or have experts
  std::vector<std::string> warn;          ///< what Megatron's own forward cannot express
  nlohmann::json defaults, params, args, fields, config;
  nlohmann::json json;                    ///< the whole, with what it extends merged in
};

/// Built-in families by name.
const std::vector<Family>& families();
/// By name, or from a .json file. Throws NotFound or BadFormat.
Family family_named(const std::string& name_or_file);
/// The family that speaks for a model_type; null where there is none.
const Family* family_of_model_type(const std::string& model_type);
/// The family whose condition fits best; null where none fits.
const Family* recognise(const shard::Params& params);

/// Parameters of the tables from config.json (with the family's defaults under it). Throws Mismatch, BadFormat.
shard::Params params_of(const Family& family, const nlohmann::json& config);

}  // namespace formats::hf
