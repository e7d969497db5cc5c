// adapter_config.json, field by field: what is understood, what changes no number, and what is refused by name.
#include "formats/hf/lora.h"
#include "formats/json.h"
#include "libshard/error.h"

#include <algorithm>
#include <cmath>

namespace formats::hf {
namespace {

using Field = nlohmann::ordered_json;

constexpr shard::Index kLargestRank = 1 << 24;

/// How training went, or where the model comes from: nothing that a merged weight depends on.
constexpr const char* kHistory[] = {"task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "lora_dropout",
                                    "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "fan_in_fan_out", "runtime_config", "ensure_weight_tying"};
/// Read below.
constexpr const char* kRead[] = {"peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "modules_to_save", "rank_pattern", "alpha_pattern", "base_model_name_or_path", "init_lora_weights", "bias",
                                 "exclude_modules", "layers_to_transform", "layers_pattern"};
/// Other methods under the same peft_type: a weight would not be W + s · B · A.
constexpr std::pair<const char*, const char*> kOthers[] = {
    {"use_dora", "DoRA"}, {"layer_replication", "replicated layers"}, {"megatron_config", "an adapter of Megatron's own modules"}, {"target_parameters", "factors of bare parameters"},
    {"lora_bias", "biases of the factors"}, {"trainable_token_indices", "trained token rows"}, {"use_qalora", "QALoRA"}, {"alora_invocation_tokens", "activated LoRA"},
    {"use_bdlora", "block-diagonal LoRA"}, {"arrow_config", "Arrow routing"}, {"kasa_config", "KaSA"}, {"velora_config", "VeLoRA"}, {"monteclora_config", "MonteCLoRA"}};
/// Ways to begin that leave the base's weights as they are; the others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change them.
constexpr const char* kHarmlessStarts[] = {"gaussian", "eva", "orthogonal", "mica"};

template <std::size_t N>
bool among(const char* const (&names)[N], const std::string& name) {
  return std::any_of(std::begin(names), std::end(names), [&](const char* one) { return name == one; });
}

/// Null, false, empty: as if the field were not there.
bool unset(const Field& value) { return value.is_null() || value == false || ((value.is_object() || value.is_array() || value.is_string()) && value.empty()); }

class Fields {
 public:
  explicit Fields(const std::filesystem::path& path) : where_(path.string()) {
    const auto text = read_text(path, 16 << 20);
    parse_json(text, where_);  // refuses duplicates and depth
    json_ = Field::parse(text);
    need(json_.is_object(), [] { return "is no JSON object"; });
  }

  LoraConfig read() {
    refuse_others();
    LoraConfig out;
    out.rank = rank(at("r"), "r");
    out.alpha = factor(at("lora_alpha"), "lora_alpha");
    if (const auto* root = find("use_rslora")) {
      need(root->is_boolean(), [] { return "use_rslora is neither true nor false"; });
      out.root = root->get<bool>();
    }
    if (const auto* base = find("base_model_name_or_path")) out.base = text(*base, "base_model_name_or_path");
    if (const auto* targets = find("target_modules")) {
      if (targets->is_string()) out.target_pattern = targets->get<std::string>();
      else out.targets = names(*targets, "target_modules");
    }
    if (const auto* excluded = find("exclude_modules")) {
      if (excluded->is_string()) out.excluded_pattern = excluded->get<std::string>();
      else out.excluded = names(*excluded, "exclude_modules");
    }
    layers(out);
    if (const auto* saved = find("modules_to_save")) out.saved = names(*saved, "modules_to_save");
    patterns("rank_pattern", [&](const std::string& key, const Field& value) { out.ranks.emplace_back(key, rank(value, "rank_pattern")); });
    patterns("alpha_pattern", [&](const std::string& key, const Field& value) { out.alphas.emplace_back(key, factor(value, "alpha_pattern")); });
    return out;
  }

 private:
  template <typename Text>
  void need(bool good, Text&& what) const {
    shard::require(good, shard::Code::BadFormat, [&] { return fmt::format("{}: {}", where_, what()); });
  }

  const Field* find(const char* name) const {
    const auto found = json_.find(name);
    return found == json_.end() || found->is_null() ? nullptr : &*found;
  }

  const Field& at(const char* name) const {
    const auto* found = find(name);
    need(found != nullptr, [&] { return fmt::format("{} is missing", name); });
    return *found;
  }

  std::string text(const Field& value, const char* name) const {
    need(value.is_string(), [&] { return fmt::format("{} is no text", name); });
    return value.get<std::string>();
  }

  shard::Index rank(const Field& value, const char* name) const {
    need(value.is_number_unsigned() && value.get<std::uint64_t>() >= 1 && value.get<std::uint64_t>() <= kLargestRank, [&] { return fmt::format("{} is no rank; a positive number is", name); });
    return value.get<shard::Index>();
  }

  double factor(const Field& value, const char* name) const {
    need(value.is_number() && std::isfinite(static_cast<float>(value.get<double>())), [&] { return fmt::format("{} is no number that f32 can hold", name); });
    return value.get<double>();
  }

  std::vector<std::string> names(const Field& value, const char* name) const {
    need(value.is_array(), [&] { return fmt::format("{} is no list of names", name); });
    std::vector<std::string> out;
    for (const auto& one : value) out.push_back(text(one, name));
    return out;
  }

  void layers(LoraConfig& out) const {
    if (const auto* layers = find("layers_to_transform")) {
      const auto add = [&](const Field& one) {
        need(one.is_number_unsigned() && one.get<std::uint64_t>() <= kLargestRank, [] { return "layers_to_transform is no layer's number and no list of them"; });
        out.layers.push_back(one.get<shard::Index>());
      };
      if (layers->is_array()) std::for_each(layers->begin(), layers->end(), add);
      else add(*layers);
      need(out.layers.empty() || out.target_pattern.empty(), [] { return "layers_to_transform is set, and target_modules is a text; PEFT takes only one of the two"; });
    }
    if (const auto* lists = find("layers_pattern")) {
      if (!lists->is_string()) out.layer_lists = names(*lists, "layers_pattern");
      else if (!lists->empty()) out.layer_lists = {lists->get<std::string>()};
      for (const auto& name : out.layer_lists)
        need(!name.empty() && name.find_first_of("\\^$*+?()[]{}|") == name.npos, [&] { return fmt::format("layers_pattern holds '{}'; a name is understood, an expression is not", name); });
    }
  }

  template <typename Add>
  void patterns(const char* name, Add&& add) const {
    const auto* found = find(name);
    if (!found) return;
    need(found->is_object(), [&] { return fmt::format("{} is no table of modules", name); });
    for (const auto& entry : found->items()) add(entry.key(), entry.value());
  }

  void refuse_others() const {
    const auto type = text(at("peft_type"), "peft_type");
    need(type == "LORA", [&] { return fmt::format("peft_type is {}; only LORA adapters are supported", type); });
    for (const auto& [name, what] : kOthers)
      if (const auto* found = find(name)) need(unset(*found), [&, n = name, w = what] { return fmt::format("{} is set: {} are not supported", n, w); });
    if (const auto* bias = find("bias")) need(text(*bias, "bias") == "none", [&] { return fmt::format("bias is {}: trained biases are not supported; 'none' is", bias->get<std::string>()); });
    if (const auto* start = find("init_lora_weights"))
      need(start->is_boolean() || among(kHarmlessStarts, text(*start, "init_lora_weights")),
           [&] { return fmt::format("init_lora_weights is {}, which changes the base's weights; convert the adapter to plain LoRA first, as PEFT can", start->get<std::string>()); });
    for (const auto& entry : json_.items()) {
      const bool known = among(kHistory, entry.key()) || among(kRead, entry.key()) || unset(entry.value()) ||
                         std::any_of(std::begin(kOthers), std::end(kOthers), [&](const auto& other) { return entry.key() == other.first; });
      need(known, [&] { return fmt::format("{} is set; what it means for the weights is not known", entry.key()); });
    }
  }

  std::string where_;
  Field json_;
};

}  // namespace

LoraConfig read_lora_config(const std::filesystem::path& folder) { return Fields(inside(folder, "adapter_config.json")).read(); }

}  // namespace formats::hf
