// Which description a checkpoint carries; a Hugging Face config beside Megatron weights is not consulted.
#include "formats/model_config.h"

#include "formats/file.h"
#include "formats/hf_config.h"
#include "formats/json.h"
#include "formats/megatron/model_config.h"
#include "libshard/error.h"

namespace formats {

shard::TransformerConfig model_config(const Checkpoint& checkpoint) {
  if (checkpoint.megatron && !checkpoint.megatron->common->is_none(checkpoint.megatron->args)) {
    auto out = megatron::model_config(*checkpoint.megatron->common, checkpoint.megatron->args, checkpoint.params, checkpoint.vocab);
    if (checkpoint.tied) out.tied = *checkpoint.tied;
    return out;
  }
  const auto path = checkpoint.folder / "config.json";
  shard::require(std::filesystem::is_regular_file(path), shard::Code::Mismatch, [&] {
    return fmt::format("{}: holds neither Megatron's args nor config.json; one of them should say how the model computes", checkpoint.path.string());
  });
  auto out = hf_model_config(parse_json(read_text(path), path.string()), path.string());
  if (checkpoint.tied) out.tied = *checkpoint.tied;
  if (out.mtp_num_layers > 0 && !checkpoint.logical.tensors.contains("mtp.0.eh_proj.weight")) {
    // transformers drops the MTP layer when it loads a model, and keeps the field when it saves it.
    out.notes.push_back(fmt::format("config.json names {} MTP layers; no weights of theirs are here", out.mtp_num_layers));
    out.mtp_num_layers = 0;
  }
  return out;
}

}  // namespace formats
