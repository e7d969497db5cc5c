// Which description a checkpoint carries: Megatron's args, config.json, or both after a conversion.
#include "formats/model_config.h"

#include "formats/file.h"
#include "formats/hf/state.h"
#include "formats/hf_config.h"
#include "formats/json.h"
#include "formats/megatron/model_config.h"
#include "libshard/error.h"

namespace formats {

namespace {

shard::TransformerConfig of_hf(const nlohmann::json& config, const std::string& where, const Checkpoint& checkpoint) {
  auto out = hf_model_config(config, where);
  if (checkpoint.tied) out.tied = *checkpoint.tied;
  if (out.mtp_num_layers > 0 && !checkpoint.logical.tensors.contains("mtp.0.eh_proj.weight")) {
    // transformers drops the MTP layer when it loads a model, and keeps the field when it saves it.
    out.notes.push_back(fmt::format("config.json names {} MTP layers; no weights of theirs are here", out.mtp_num_layers));
    out.mtp_num_layers = 0;
  }
  return out;
}

bool same_sizes(const shard::TransformerConfig& a, const shard::TransformerConfig& b) {
  return a.num_layers == b.num_layers && a.hidden_size == b.hidden_size && a.num_attention_heads == b.num_attention_heads && a.num_experts == b.num_experts &&
         a.multi_latent_attention == b.multi_latent_attention;
}

}  // namespace

shard::TransformerConfig model_config(const Checkpoint& checkpoint) {
  if (checkpoint.megatron && !checkpoint.megatron->common->is_none(checkpoint.megatron->args)) {
    auto out = megatron::model_config(*checkpoint.megatron->common, checkpoint.megatron->args, checkpoint.params, checkpoint.vocab);
    if (checkpoint.tied) out.tied = *checkpoint.tied;
    if (!checkpoint.hf) return out;
    // A converted model: args lack what Megatron cannot express (soft caps, parallel residuals, …), the carried file does not.
    const auto where = (checkpoint.hf->folder / "config.json").string();
    auto carried = of_hf(nlohmann::json::parse(checkpoint.hf->config.dump()), where, checkpoint);
    if (same_sizes(carried, out)) {
      carried.notes.push_back("computed as the carried hf/config.json says; Megatron's args may say less");
      return carried;
    }
    out.notes.push_back("the carried hf/config.json is of another model; args are followed");
    return out;
  }
  const auto path = inside(checkpoint.folder, "config.json");
  shard::require(std::filesystem::is_regular_file(path), shard::Code::Mismatch, [&] {
    return fmt::format("{}: holds neither Megatron's args nor config.json; one of them should say how the model computes", checkpoint.path.string());
  });
  return of_hf(parse_json(read_text(path), path.string()), path.string(), checkpoint);
}

}  // namespace formats
