// The Megatron family over a stored dictionary.
#include "formats/megatron/model.h"

#include "formats/megatron/args.h"
#include "libshard/error.h"
#include "libshard/families/megatron.h"
#include "libshard/translate.h"

#include <algorithm>

namespace formats::megatron {
namespace {

using shard::Finding;

constexpr std::uint64_t kMostExtraState = 256ull << 20;

std::string family_of(const shard::Params& params) {
  const auto is = [&](const char* name) { return shard::holds(name, params); };
  std::string out = is("mla") ? "mla" : is("learned_positions") ? "gpt" : "llama";
  if (is("experts")) out += "-moe";
  if (is("mtp")) out += "-mtp";
  return out;
}

void check_vocabulary(Checkpoint& checkpoint) {
  const auto found = checkpoint.stored.tensors.find("embedding.word_embeddings.weight");
  if (found == checkpoint.stored.tensors.end() || found->second.global_shape.empty()) return;
  const auto rows = found->second.global_shape[0];
  const auto add = [&](std::string message) {
    checkpoint.findings.push_back({"padding", Finding::Severity::Error, found->first, std::move(message)});
  };
  if (const auto padded = checkpoint.params.find("padded_vocab"); padded != checkpoint.params.end() && padded->second != rows)
    add(fmt::format("holds {} rows; args say a padded vocabulary of {}", rows, padded->second));
  else if (checkpoint.vocab && *checkpoint.vocab > rows)
    add(fmt::format("holds {} rows; the true vocabulary is {}", rows, *checkpoint.vocab));
}

/// Tensors of modules that the model does not build by its args: no reader would take them. What args do not speak of, as older ones did not, may be there.
void check_ruled_out(Checkpoint& checkpoint, const shard::Table& table, const shard::SpellOptions& sizes) {
  const auto& state = *checkpoint.megatron;
  auto params = checkpoint.params;
  const auto said = [&](const char* name) { return state.common->attribute(state.args, name).has_value(); };
  const auto allow = [&](const char* switched, bool yes) {
    if (yes) params[switched] = 1;
  };
  const bool biases = said("add_bias_linear") || said("disable_bias_linear");
  allow("mlp_bias", !biases);
  allow("qkv_bias", !biases);
  allow("qk_norm", !said("qk_layernorm"));
  allow("expert_bias", !said("moe_router_enable_expert_bias"));
  allow("shared_gate", !said("moe_shared_expert_gate"));
  allow("sinks", !said("softmax_type"));
  allow("mtp", !said("mtp_num_layers"));
  allow("router_bias", true);  // came with 0.13
  allow("post_norms", true);   // Megatron-Bridge's, which no argument names
  params["tied"] = 0;          // a tied head is its owner's copy
  const auto placed = placed_names(checkpoint.logical, table, params, sizes);
  for (const auto& entry : checkpoint.logical.tensors)
    if (!placed.contains(entry.first))
      checkpoint.findings.push_back({"unexpected", Finding::Severity::Error, entry.first, "the checkpoint holds it; the model that args describe has no such tensor"});
}

void check_mixtures(Checkpoint& checkpoint, const std::vector<bool>& moe_layers) {
  const auto layers = checkpoint.params.find("layers");
  const auto count = checkpoint.megatron->layers;
  if (!checkpoint.params.contains("experts") || !moe_layers.empty() || layers == checkpoint.params.end() || layers->second != count) return;
  checkpoint.findings.push_back({"unexpected", Finding::Severity::Error, "args.moe_layer_freq", fmt::format("should be a whole number above 0 or a list of {} entries, one a layer", count)});
}

}  // namespace

void interpret(Checkpoint& checkpoint, std::string_view dialects, const OpenOptions& options) {
  auto& state = *checkpoint.megatron;
  auto& params = checkpoint.params;
  take_vocabulary(checkpoint, options);
  const shard::Table table(shard::megatron_rows(), dialects);
  for (auto it = checkpoint.stored.tensors.begin(); it != checkpoint.stored.tensors.end();) {
    const bool drop = std::any_of(options.drop.begin(), options.drop.end(), [&](const auto& pattern) { return glob(pattern, it->first); });
    if (drop) checkpoint.not_carried.push_back({it->first, "--drop"});
    it = drop ? checkpoint.stored.tensors.erase(it) : std::next(it);
  }
  auto translation = to_logical(checkpoint.stored, table, params, checkpoint.optimizer, checkpoint.findings);
  checkpoint.logical = std::move(translation.logical);
  std::erase_if(checkpoint.logical.tensors, [&](const auto& entry) {
    const bool drop = std::any_of(options.drop.begin(), options.drop.end(), [&](const auto& pattern) { return glob(pattern, entry.first); });
    if (drop) checkpoint.not_carried.push_back({entry.first, "--drop"});
    return drop;
  });
  state.rows = std::move(translation.rows);
  state.stacked = translation.layers_stacked;
  state.layers = std::max(translation.layers, shard::Index{0});
  state.experts = translation.experts;
  state.mtp_layers = translation.depths;
  if (const auto layers = params.find("layers"); layers != params.end()) {
    if (layers->second < translation.layers)
      checkpoint.findings.push_back({"unexpected", Finding::Severity::Error, fmt::format("layers.{}", translation.layers - 1),
                                     fmt::format("the checkpoint numbers {} layers; args say {}", translation.layers, layers->second)});
    // A hostile count must not make work: layers beyond those seen are one finding, not one each.
    if (layers->second > translation.layers)
      checkpoint.findings.push_back({"missing", Finding::Severity::Error, fmt::format("layers.{}", translation.layers),
                                     fmt::format("the checkpoint holds {} layers; args say {}", translation.layers, layers->second)});
  }
  const auto check_count = [&](const char* param, const char* head, const char* what, shard::Index found) {
    const auto wanted = params.find(param);
    if (wanted == params.end() || wanted->second == found) return;
    const auto dropped = [&](const Dropped& one) { return one.why == "--drop" && one.key.find(head) != std::string::npos; };
    if (std::any_of(checkpoint.not_carried.begin(), checkpoint.not_carried.end(), dropped)) return;  // all of them: no hole
    checkpoint.findings.push_back({wanted->second > found ? "missing" : "unexpected", Finding::Severity::Error,
                                   fmt::format("{}{}", head, std::min(wanted->second, found)),
                                   fmt::format("the checkpoint numbers {} {}; args say {}", found, what, wanted->second)});
  };
  check_count("experts", "mlp.experts.", "experts", translation.experts);
  check_count("mtp", "mtp.", "MTP layers", translation.depths);
  const bool untied_head = checkpoint.logical.tensors.contains("output.weight");
  checkpoint.tied = !untied_head && shard::holds("tied", params);
  if (*checkpoint.tied) checkpoint.logical.ties["output.weight"] = "embedding.word.weight";
  checkpoint.family = family_of(params);
  if (state.args != 0) {
    const shard::SpellOptions sizes{nullptr, state.layers, state.experts, state.mtp_layers, moe_layers_of(*state.common, Args(*state.common, state.args), state.layers)};
    check_expected(checkpoint.logical, table, params, sizes, checkpoint.findings);
    check_mixtures(checkpoint, sizes.moe_layers);
    check_ruled_out(checkpoint, table, sizes);
  }
  check_vocabulary(checkpoint);
  for (const auto& [key, tensor] : checkpoint.logical.tensors) check_cover(tensor, checkpoint.findings, 2);
}

ExtraState extra_state(const File& file, const TorchFile& archive, pickle::Ref node) {
  const auto& g = archive.graph;
  if (g.is_none(node)) return {};
  if (const auto tensor = tensor_of(g, node); tensor && tensor->dtype == shard::DType::U8 && tensor->sizes.size() == 1) {
    ExtraState out{ExtraState::Kind::Tensor, {}, nullptr, 0};
    const auto size = static_cast<std::uint64_t>(tensor->sizes[0]);
    shard::require(size <= kMostExtraState, shard::Code::BadFormat, [&] { return fmt::format("extra state of {} bytes is beyond reason", size); });
    shard::require(size < 2 || tensor->strides[0] == 1, shard::Code::BadFormat, [] { return "extra state: its bytes do not lie side by side"; });
    const auto* record = archive.zip.find("data/" + tensor->storage);
    if (size > 0 && record) {  // it is written again with a sum of its own, which would make damage look sound
      const auto wrong = wrong_sum(file, archive.zip, *record);
      shard::require(wrong.empty(), shard::Code::BadFormat, [&] { return "extra state: " + wrong; });
      out.bytes = file.text(record->offset + tensor->offset, size);
    }
    return out;
  }
  auto graph = std::make_shared<pickle::Graph>();
  const auto ref = graph->import(g, node);
  return {ExtraState::Kind::Object, {}, std::move(graph), ref};
}

std::string extra_state_name(const shard::Table& table, const shard::Params& params, std::string_view key) {
  constexpr std::string_view kSuffix = "_extra_state";
  const auto module = std::string(key.substr(0, key.size() - kSuffix.size()));
  for (const char* weight : {"weight", "weight0"})
    if (const auto match = table.match(module + weight, params))
      return shard::spell(match->row->parts.front().name, match->layer, match->expert, match->depth);
  return {};
}

}  // namespace formats::megatron
