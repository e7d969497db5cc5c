// Writing a Hugging Face folder: which tensors, in which spelling, and the config that explains them.
#include "formats/hf/hf.h"
#include "formats/plain.h"
#include "formats/safetensors/header.h"
#include "libshard/error.h"
#include "libshard/families/megatron.h"

#include <algorithm>

namespace formats::hf {
namespace {

using shard::Code;

/// All bytes of a tensor are zero.
bool zero(const Checkpoint& source, const shard::ShardedTensor& tensor) {
  const LocalReader reader(source.logical, source.files);
  for (const auto& shard : tensor.shards) {
    const auto& range = source.logical.streams[shard.place.stream];
    const auto item = size_of(tensor.dtype);
    std::vector<std::byte> bytes(item);
    auto at = std::vector<shard::Index>(shard.box.size.size());
    for (shard::Index n = shard::volume(shard.box.size); n-- > 0;) {
      auto offset = shard.place.offset;
      for (std::size_t d = 0; d < at.size(); ++d) offset += static_cast<std::uint64_t>(at[d] * shard.place.stride[d]);
      if (offset + item > range.size) return false;
      reader.read(shard.place.stream, offset, bytes);
      if (std::any_of(bytes.begin(), bytes.end(), [](std::byte b) { return b != std::byte{}; })) return false;
      for (auto d = at.size(); d-- > 0;) {
        if (++at[d] < shard.box.size[d]) break;
        at[d] = 0;
      }
    }
  }
  return true;
}

const Family& family_for(const Checkpoint& source) {
  if (source.hf) return source.hf->family;
  const auto* found = family_by_settings(source);
  shard::require(found != nullptr, Code::Mismatch, [&] { return fmt::format("{}: fits no Hugging Face family by its args; --family names one", source.path.string()); });
  return *found;
}

/// Biases that only Megatron has: dropped where they are zeros.
void drop_zero_biases(const Checkpoint& source, shard::ShardedStateDict& logical, const std::set<std::string>& placed, Target& target) {
  std::erase_if(logical.tensors, [&](const auto& entry) {
    if (!entry.first.ends_with(".bias") || placed.contains(entry.first)) return false;
    shard::require(zero(source, entry.second), Code::Mismatch, [&] { return fmt::format("{}: is not zero, and config.json has no place for it", entry.first); });
    target.dropped.push_back({entry.first, "zeros that only Megatron needs"});
    return true;
  });
}

/// Scales and the like, which transformers' modules do not keep. Megatron's own layers have none.
void drop_extra_states(const Checkpoint& source, Target& target) {
  if (!source.megatron) return;
  const auto count = std::count_if(source.megatron->extra.begin(), source.megatron->extra.end(),
                                   [](const auto& entry) { return entry.second.kind == ExtraState::Kind::Object || !entry.second.bytes.empty(); });
  if (count) target.dropped.push_back({"_extra_state", fmt::format("{} of them that are not empty: Hugging Face folders hold only tensors", count)});
}

/// A new config.json must be read as it was meant: its fields have no place for every size, nor families for every switch.
void check_said(const Family& family, const nlohmann::ordered_json& config, const Checkpoint& source, const shard::ShardedStateDict& logical, const std::vector<shard::Wanted>& wanted,
                const shard::Table& table, const shard::SpellOptions& sizes) {
  auto said = params_of(family, nlohmann::json::parse(config.dump()));
  const auto differs = [&](const std::string& what, auto ours, auto theirs) {
    shard::fail(Code::Mismatch, "{}: {} in {}; the config.json of {} can only say {}", what, ours, source.path.string(), family.name, theirs);
  };
  for (const auto& [param, what, count] : {std::tuple{"layers", "layers", sizes.layers}, std::tuple{"experts", "experts", sizes.experts}, std::tuple{"mtp", "MTP layers", sizes.depths}})
    if (const auto found = said.find(param); found != said.end() && found->second != count) differs(what, count, found->second);
  for (const auto& one : wanted) {
    auto shape = factors(*one.row, said).stored();
    if (one.row->stacked) shape.insert(shape.begin(), sizes.experts);
    if (shape != one.shape) differs(one.key, shard::to_string(one.shape), shard::to_string(shape));
  }
  if (std::any_of(source.not_carried.begin(), source.not_carried.end(), [](const Dropped& one) { return one.why == "--drop"; })) return;  // holes were asked for
  const auto missing = missing_tensors(logical, table, said, sizes);
  shard::require(missing.empty(), Code::Mismatch,
                 [&] { return fmt::format("{}: every model of {} has it; {} does not hold it ({} such tensors)", missing.front().name, family.name, source.path.string(), missing.size()); });
}

}  // namespace

void create(const std::filesystem::path& path, const Checkpoint& source, const TargetOptions& options, Target& target) {
  const auto& family = family_for(source);
  shard::require(source.vocab.has_value(), Code::Mismatch, [&] { return fmt::format("{}: the true vocabulary size is not known; give --vocab-size", source.path.string()); });
  const bool configured = source.hf && !source.hf->config.is_null();
  auto params = configured ? params_of(family, source.hf->config) : source.params;
  if (!configured) params["out_bias"] = shard::holds("mlp_bias", params);
  params["tied"] = source.tied.value_or(false);
  params["vocab"] = *source.vocab;
  const auto sizes = source.megatron ? shard::SpellOptions{nullptr, source.megatron->layers, source.megatron->experts, source.megatron->mtp_layers}
                                     : shard::SpellOptions{nullptr, source.sizes.layers, source.sizes.experts, source.sizes.mtp_layers};
  params["layers"] = sizes.layers;
  params["mtp"] = sizes.depths;
  const shard::Table table(family.rows, "h");
  auto logical = source.logical;
  drop_zero_biases(source, logical, placed_names(logical, table, params, sizes), target);
  auto wanted = spell_out(logical, table, params, sizes);
  const auto config = configured ? nlohmann::ordered_json() : config_of(family, source);
  if (!configured) check_said(family, config, source, logical, wanted, table, sizes);
  std::vector<PlainTensor> tensors;
  for (const auto& one : wanted) {
    const auto dtype = options.dtype && is_floating(one.dtype) && !one.key.ends_with("e_score_correction_bias") ? *options.dtype : one.dtype;
    tensors.push_back({one.key, dtype, one.shape});
  }
  drop_extra_states(source, target);
  target.writer = make_writer(path, options);
  write_safetensors(target, tensors, options.max_shard_size, source.megatron ? std::map<std::string, std::string>{} : source.metadata);
  auto& stored = target.writer->described();
  for (const auto& one : wanted) stored.tensors.at(one.key).vocabulary = one.row->vocabulary;
  std::vector<shard::Finding> findings;
  target.logical = to_logical(stored, table, params, {}, findings).logical;
  refuse(findings);
  auto& folder = target.writer->folder();
  if (!configured) {
    auto made = config;
    if (options.dtype) made["torch_dtype"] = shard::torch_name(*options.dtype);
    folder.write(folder.add("config.json"), 0, made.dump(2) + "\n");
    for (const auto& file : source.beside) target.dropped.push_back({"hf/" + file.filename().string(), "config.json there is of no known family; --family names one"});
  } else {
    carry_files(source, target, "", options.dtype);
  }
  stored.files = folder.names();
  target.logical.files = stored.files;
}

}  // namespace formats::hf
