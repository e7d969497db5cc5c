// LoRA adapters as PEFT saves them: what adapter_config.json says, and which tensors are the two factors of which module.
#pragma once

#include "formats/hf/family.h"
#include "formats/target.h"

#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace formats::hf {

/// What adapter_config.json says of the arithmetic; everything in it that changes a weight in another way is refused.
struct LoraConfig {
  shard::Index rank = 0;
  double alpha = 0;
  bool root = false;                                    ///< rsLoRA: alpha is divided by the root of the rank
  std::string base;                                     ///< name of the model, or its folder; "" where it is not said
  std::vector<std::string> targets, saved;              ///< target_modules and modules_to_save, as listed
  std::string target_pattern;                           ///< target_modules as one text: a regular expression or "all-linear"
  std::vector<std::string> excluded;                    ///< exclude_modules, as listed
  std::string excluded_pattern;                         ///< exclude_modules as one text: a regular expression
  std::vector<shard::Index> layers;                     ///< layers_to_transform; empty: all
  std::vector<std::string> layer_lists;                 ///< layers_pattern: what the numbered layers are below; empty: anything
  std::vector<std::pair<std::string, shard::Index>> ranks;  ///< by module pattern; the first that fits counts
  std::vector<std::pair<std::string, double>> alphas;
};

/// Throws NotFound, and BadFormat where a field is malformed, not understood, or asks for another method.
LoraConfig read_lora_config(const std::filesystem::path& folder);

/// The factors of one module: its weight gets scaling · B · A.
struct LoraModule {
  std::string name;        ///< path in the base model
  std::string a, b;        ///< stored keys
  bool embedding = false;  ///< the weight lies as vocabulary | hidden, the product the other way round
  double scaling = 0;
};

/// What an opened adapter is beside its tensors.
struct Adapter {
  LoraConfig config;
  std::vector<LoraModule> modules;
  std::map<std::string, std::string> replaced;  ///< tensor of the base → stored key that stands in its place
};

/// Holds an adapter_config.json.
bool is_adapter(const std::filesystem::path& folder);
/// Holds one, and no weights of a base beside it.
bool is_bare_adapter(const std::filesystem::path& folder);

/// The adapter; its tensors keep PEFT's keys. What does not fit together is a finding.
Checkpoint open_adapter(const std::filesystem::path& folder, const OpenOptions& options);

/// The same adapter once more: same keys, maybe another type.
void create_adapter(const std::filesystem::path& path, const Checkpoint& source, const TargetOptions& options, Target& target);

/// Every weight of `base.stored` that the adapter changes becomes one that is computed when it is read. `rows` spell the
/// base's keys. Throws Mismatch where the base lacks a weight or it has another shape, BadFormat where it is no number that
/// can be added to.
void merge_adapter(Checkpoint& base, const Checkpoint& adapter, const Family& family, const std::vector<shard::Row>& rows);

}  // namespace formats::hf
