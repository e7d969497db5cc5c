// Between Hugging Face folders and everything else.
#pragma once

#include "formats/hf/state.h"
#include "formats/target.h"

namespace formats::hf {

/// Reads config.json beside the weights; the checkpoint's keys become logical tensors where a family speaks for them.
/// Without config.json, or where no family knows its model_type, keys stay their own names.
void interpret(Checkpoint& checkpoint, const OpenOptions& options);

/// The logical tensors of `stored`, whose keys are spelled as in the source's Hugging Face folder.
shard::ShardedStateDict logical_of(const Checkpoint& source, const shard::ShardedStateDict& stored, std::vector<shard::Finding>& findings);

/// Stored keys of heads that repeat the embedding that they are tied to: no target keeps them.
std::set<std::string> repeated_heads(const Checkpoint& source);

/// Takes up the folder `hf/` that a conversion left beside `iter_*`, so that the way back is exact.
void take_up_carried(Checkpoint& checkpoint, const OpenOptions& options);

/// The source as a Megatron model: args made from config.json, biases that Megatron has and config lacks as zeros.
/// `notes` gets what Megatron's own forward cannot express. Throws Mismatch where a weight has no place.
Checkpoint as_megatron(const Checkpoint& source, std::vector<std::string>& notes);

/// argparse.Namespace for the source's model in `graph`; see docs/formats/families.md.
pickle::Ref args_of(const Checkpoint& source, pickle::Graph& graph, std::vector<std::string>& notes);

/// The family that a Megatron model fits by its parameters and settings: a llama whose layers all slide is a mistral, one that turns
/// a part of each head a phi3. null where none fits.
const Family* family_by_settings(const Checkpoint& source);

/// config.json for a Megatron model that brings none, in the spelling of transformers 4 that 5 reads as well. Throws Mismatch where
/// transformers would compute something else by it.
nlohmann::ordered_json config_of(const Family& family, const Checkpoint& source);

/// A Hugging Face folder: sharded safetensors, config.json, the carried files. Throws Mismatch where the true vocabulary
/// size is not known or a tensor has no place.
void create(const std::filesystem::path& path, const Checkpoint& source, const TargetOptions& options, Target& target);

/// The files of a folder that travel with a model: configuration and tokenizer.
std::vector<std::string> small_files(const std::filesystem::path& folder);

/// Copies config.json and the small files below `below` ("hf/" in a Megatron run); config.json names the type that weights are cast to.
void carry_files(const Checkpoint& source, Target& target, const std::string& below, std::optional<shard::DType> dtype);

/// Names in `not_carried` what the folder holds beside weights, configuration and tokenizer; of many, the first by name.
void name_others(Checkpoint& checkpoint, const OpenOptions& options);

}  // namespace formats::hf
