// A table of renames; the first that fits each part of the key applies.
#include "formats/megatron/old_names.h"

#include <utility>

namespace formats::megatron {
namespace {

using Rename = std::pair<std::string_view, std::string_view>;

constexpr Rename kPrefixes[] = {
    {"language_model.embedding.", "embedding."},
    {"language_model.encoder.final_norm.", "decoder.final_layernorm."},
    {"language_model.encoder.final_layernorm.", "decoder.final_layernorm."},
    {"language_model.transformer.final_layernorm.", "decoder.final_layernorm."},
    {"language_model.encoder.", "decoder."},
    {"language_model.transformer.", "decoder."},
    {"language_model.output_layer.", "output_layer."},
    {"word_embeddings_for_head.", "output_layer."},
};

constexpr Rename kModules[] = {
    {".input_norm.", ".input_layernorm."},
    {".post_attention_norm.", ".pre_mlp_layernorm."},
    {".post_attention_layernorm.", ".pre_mlp_layernorm."},
    {".attention.query_key_value.", ".self_attention.linear_qkv."},
    {".self_attention.query_key_value.", ".self_attention.linear_qkv."},
    {".attention.dense.", ".self_attention.linear_proj."},
    {".self_attention.dense.", ".self_attention.linear_proj."},
    {".mlp.dense_h_to_4h.", ".mlp.linear_fc1."},
    {".mlp.dense_4h_to_h.", ".mlp.linear_fc2."},
};

}  // namespace

std::string modern_name(std::string_view key) {
  while (key.starts_with("module.") || key.starts_with("model.")) key.remove_prefix(key.find('.') + 1);
  std::string out(key);
  for (const auto& [old, name] : kPrefixes)
    if (key.starts_with(old)) {
      out.replace(0, old.size(), name);
      break;
    }
  for (const auto& [old, name] : kModules)
    if (const auto at = out.find(old); at != out.npos) {
      out.replace(at, old.size(), name);
      break;
    }
  return out;
}

}  // namespace formats::megatron
