// A Hugging Face model as Megatron would hold it, before it is cut.
#include "formats/hf/hf.h"
#include "formats/json.h"
#include "libshard/error.h"
#include "libshard/families/megatron.h"
#include "libshard/translate.h"

#include <algorithm>

namespace formats::hf {
namespace {

struct Zeros final : ComputedBytes {
  void read(std::uint64_t, std::span<std::byte> into) const override { std::fill(into.begin(), into.end(), std::byte{}); }
};

/// Megatron switches all biases of a kind at once; those that this model lacks are zeros.
void add_zero_biases(Checkpoint& model, const shard::SpellOptions& sizes, std::vector<std::string>& notes) {
  const shard::Table table(shard::megatron_rows(), "t");
  const auto like = model.logical.tensors.find("embedding.word.weight");
  if (like == model.logical.tensors.end()) return;
  std::size_t added = 0;
  std::optional<std::uint32_t> file;
  for (const auto& part : missing_tensors(model.logical, table, model.params, sizes)) {
    if (!part.name.ends_with(".bias") || part.name.find("norm") != part.name.npos) continue;
    if (!file) {
      file = model.files->add(std::make_shared<const Zeros>());
      model.logical.files.resize(*file + 1);
      model.logical.files[*file] = "zeros";
    }
    const auto dtype = like->second.dtype;
    const auto bytes = static_cast<std::uint64_t>(shard::volume(part.shape)) * size_of(dtype);
    auto stride = shard::row_major(part.shape);
    for (auto& step : stride) step *= static_cast<shard::Index>(size_of(dtype));
    model.logical.tensors[part.name] = {part.name, dtype, part.shape, part.natural,
                                        {{shard::whole(part.shape), {static_cast<std::uint32_t>(model.logical.streams.size()), 0, stride}, {}}}, false};
    model.logical.streams.push_back({*file, 0, bytes, std::nullopt, false});
    ++added;
  }
  if (added > 0) notes.push_back(fmt::format("Megatron has biases on every linear layer or on none: {} that the model lacks are written as zeros", added));
}

}  // namespace

Checkpoint as_megatron(const Checkpoint& source, std::vector<std::string>& notes) {
  shard::require(!shard::holds("rope_halves", source.params), shard::Code::BadFormat,
                 [&] { return fmt::format("{}: rope_interleave is false: rotary rows stored as halves have no rule for Megatron yet", source.path.string()); });
  auto out = source;
  auto& params = out.params;
  if (shard::holds("out_bias", params) || shard::holds("mlp_bias", params)) params["mlp_bias"] = params["qkv_bias"] = 1;
  params.try_emplace("vocab_multiple", 128);
  out.megatron.emplace();
  auto& state = *out.megatron;
  state.layers = source.sizes.layers;
  state.experts = source.sizes.experts;
  state.mtp_layers = source.sizes.mtp_layers;
  state.te = true;
  add_zero_biases(out, {nullptr, state.layers, state.experts, state.mtp_layers}, notes);
  auto graph = std::make_shared<pickle::Graph>();
  state.args = args_of(source, *graph, notes);
  state.common = std::move(graph);
  return out;
}

void carry_files(const Checkpoint& source, Target& target, const std::string& below, std::optional<shard::DType> dtype) {
  const bool known = source.hf && !source.hf->config.is_null();
  auto& folder = target.writer->folder();
  const auto config_text = [&](nlohmann::ordered_json config) {
    if (dtype) config[config.contains("dtype") ? "dtype" : "torch_dtype"] = shard::torch_name(*dtype);
    return config.dump(2) + "\n";
  };
  auto paths = source.beside;
  if (known)
    for (const auto& name : source.hf->files) paths.push_back(inside(source.hf->folder, name));
  if (known && std::find(source.hf->files.begin(), source.hf->files.end(), "config.json") == source.hf->files.end())
    folder.write(folder.add(below + "config.json"), 0, config_text(source.hf->config));
  for (const auto& path : paths) {
    const auto name = path.filename().string();
    auto text = read_text(path);
    if (name == "config.json" && (dtype || (known && source.hf->rewritten))) {
      if (!known) shard::require(parse_json(text, path.string()).is_object(), shard::Code::BadFormat, [&] { return fmt::format("{}: is no JSON object", path.string()); });
      text = config_text(known ? source.hf->config : nlohmann::ordered_json::parse(text));
    }
    folder.write(folder.add(below + name), 0, text);
    target.carried.push_back(name);
  }
}

}  // namespace formats::hf
