// Rules as transformers 5.23 applies them; layer numbers start at 0.
#include "formats/hf/layer_rules.h"

#include "libshard/error.h"

namespace formats::hf {
namespace {

using Json = nlohmann::ordered_json;

bool flag(const Json& config, const char* name, bool otherwise) {
  const auto* found = field(config, name);
  return found && found->is_boolean() ? found->get<bool>() : otherwise;
}

}  // namespace

const Json* field(const Json& config, const char* name) {
  if (!config.is_object()) return nullptr;
  const auto found = config.find(name);
  return found == config.end() || found->is_null() ? nullptr : &*found;
}

double number(const Json& config, const char* name, double otherwise) {
  const auto* found = field(config, name);
  shard::require(!found || found->is_number(), shard::Code::BadFormat, [&] { return fmt::format("config.json: {} is {}; should be a number", name, found->dump()); });
  return found ? found->get<double>() : otherwise;
}

bool turns_parts(const Family& family) { return family.defaults.contains("partial_rotary_factor") || family.defaults.contains("rotary_pct"); }

Json with_defaults(const Family& family, const Json& config) {
  auto out = config;
  for (const auto& [key, value] : family.defaults.items())
    if (!out.contains(key)) out[key] = value;
  return out;
}

std::optional<Window> window_of(const Family& family, const Json& given, shard::Index layers) {
  const auto config = with_defaults(family, given);
  const auto size = static_cast<shard::Index>(number(config, "sliding_window", 0));
  if (size <= 0 || family.window.empty()) return std::nullopt;
  Window out{size, std::vector<bool>(static_cast<std::size_t>(layers))};
  const bool listed = family.window != "all" && family.window != "all_if_used";  // those classes leave layer_types out
  const auto* types = listed ? field(config, "layer_types") : nullptr;
  const bool qwen = family.window.starts_with("from_") || family.window.starts_with("even_below") || family.window == "all_if_used";
  if (!types && qwen && !flag(config, "use_sliding_window", false)) return std::nullopt;
  const auto edge = static_cast<shard::Index>(number(config, "max_window_layers", static_cast<double>(layers)));
  const auto period = static_cast<shard::Index>(number(config, "sliding_window_pattern", number(config, "_sliding_window_pattern", 6)));
  bool any = false;
  for (shard::Index i = 0; i < layers; ++i) {
    bool slides = true;
    if (types && types->is_array() && static_cast<std::size_t>(i) < types->size()) slides = (*types)[static_cast<std::size_t>(i)] == "sliding_attention";
    else if (family.window == "even") slides = i % 2 == 0;
    else if (family.window == "pattern") slides = period > 0 && (i + 1) % period != 0;
    else if (family.window == "from_max_window_layers") slides = i >= edge;
    else if (family.window == "even_below_max_window_layers") slides = i % 2 == 0 && i < edge;
    out.slides[static_cast<std::size_t>(i)] = slides;
    any |= slides;
  }
  if (!any) return std::nullopt;
  return out;
}

Rope rope_of(const Family& family, const Json& config) {
  Rope out;
  const auto* parameters = field(config, "rope_parameters");
  if (parameters && field(*parameters, "full_attention")) parameters = field(*parameters, "full_attention");
  const auto* older = field(config, "rope_scaling");  // counts before the other, unless it is empty
  const auto* scaling = older && !older->empty() ? older : parameters;
  if (scaling && scaling->is_object()) out.scaling = *scaling;
  out.base = number(out.scaling, "rope_theta", number(config, "rope_theta", number(config, "rotary_emb_base", 10000)));
  if (turns_parts(family)) out.percent = number(out.scaling, "partial_rotary_factor", number(config, "partial_rotary_factor", number(config, "rotary_pct", 1)));
  for (const auto* name : {"type", "rope_type"})
    if (const auto* type = field(out.scaling, name); type && type->is_string()) out.type = type->get<std::string>();
  return out;
}

}  // namespace formats::hf
