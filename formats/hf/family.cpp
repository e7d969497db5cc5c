// Reading family files: what extends what, rows, and parameters as expressions over config.json.
#include "formats/hf/family.h"

#include "formats/checkpoint.h"
#include "formats/file.h"
#include "formats/json.h"
#include "libshard/error.h"
#include "libshard/families/megatron.h"

#include <algorithm>
#include <map>

std::vector<std::string_view> shardkit_embedded_families();

namespace formats::hf {
namespace {

using nlohmann::json;
using shard::Code;

constexpr std::uint64_t kLargestFile = 1 << 20;
constexpr int kDeepestExtends = 8;
constexpr const char* kRowFields[] = {"key", "dims", "when", "holds", "parts", "factor", "from", "size", "order", "refine", "vocabulary", "optional", "copy", "stacked"};
constexpr const char* kPartFields[] = {"holds", "factor", "from", "size", "order", "refine"};
constexpr const char* kWindows[] = {"", "all", "all_if_used", "even", "pattern", "from_max_window_layers", "even_below_max_window_layers"};

std::string text(const json& object, const char* key) {
  const auto found = object.find(key);
  return found == object.end() || !found->is_string() ? std::string() : found->get<std::string>();
}

std::vector<std::string> texts(const json& object, const char* key) {
  std::vector<std::string> out;
  if (const auto found = object.find(key); found != object.end() && found->is_array())
    for (const auto& item : *found)
      if (item.is_string()) out.push_back(item.get<std::string>());
  return out;
}

/// A field with a slip of the pen would be left out in silence.
template <std::size_t N>
void refuse_unknown(const json& object, const char* const (&known)[N], const char* what) {
  for (const auto& [name, value] : object.items())
    shard::require(std::any_of(std::begin(known), std::end(known), [&, &name = name](const char* one) { return name == one; }), Code::BadFormat,
                   [&, &name = name] { return fmt::format("family: {} '{}': the field '{}' is not known", what, text(object, what[0] == 'r' ? "key" : "holds"), name); });
}

shard::Part part_of(const json& object) {
  shard::Part out{text(object, "holds"), object.value("factor", -1), text(object, "from"), text(object, "size"), {}, text(object, "refine")};
  if (object.contains("order")) out.order = object["order"].get<std::vector<int>>();
  return out;
}

shard::Stage stage_of(const std::string& key, const std::string& logical) {
  if (key.find("{m}") != key.npos || logical.starts_with("mtp.")) return shard::Stage::Mtp;
  if (logical.starts_with("embedding.")) return shard::Stage::Embedding;
  if (logical.starts_with("final_norm")) return shard::Stage::FinalNorm;
  return logical.starts_with("output") ? shard::Stage::Output : shard::Stage::Layer;
}

shard::Row row_of(const json& object) {
  refuse_unknown(object, kRowFields, "row");
  shard::Row row;
  row.dialects = "h";
  row.key = text(object, "key");
  row.dims = text(object, "dims");
  row.when = text(object, "when");
  if (object.contains("parts"))
    for (const auto& part : object["parts"]) {
      refuse_unknown(part, kPartFields, "part");
      row.parts.push_back(part_of(part));
    }
  else row.parts.push_back(part_of(object));
  row.vocabulary = object.value("vocabulary", false);
  row.optional = object.value("optional", false);
  row.copy = object.value("copy", false);
  row.stacked = object.value("stacked", false);
  row.stage = stage_of(row.key, row.parts.front().name);
  return row;
}

/// Factors, ranges and orders that no tensor could have are refused when the file is read, not when a model is.
void check(const shard::Row& row) {
  const auto bad = [&](const char* what) { shard::fail(Code::BadFormat, "family: row '{}': {}", row.key, what); };
  if (row.key.empty() || row.dims.empty()) bad("needs a key and dims");
  const auto bars = std::count(row.dims.begin(), row.dims.end(), '|');
  int factors = 0;
  for (std::size_t at = 0; (at = row.dims.find_first_not_of(" |", at)) != row.dims.npos; at = std::min(row.dims.find(' ', at), row.dims.size())) ++factors;
  if (factors <= bars || factors > 16) bad("dims are not factors between bars");
  for (const auto& part : row.parts) {
    if (part.name.empty()) bad("a part holds nothing");
    if (part.factor >= factors || (part.factor < 0 && !part.refine.empty())) bad("a part's factor is out of range");
    if (part.factor >= 0 && (part.lo.empty() || part.size.empty())) bad("a part of a factor needs 'from' and 'size'");
    auto order = part.order;
    std::sort(order.begin(), order.end());
    for (std::size_t i = 0; i < order.size(); ++i)
      if (order[i] != static_cast<int>(i)) bad("an order is no permutation");
    if (!order.empty() && part.refine.empty() && static_cast<int>(order.size()) != factors) bad("an order leaves factors out");
  }
}

/// The rows of the layer that stands for an MTP depth: those of a decoder layer under other numbers.
void add_mtp_layers(std::vector<shard::Row>& rows, const std::string& prefix) {
  const auto layers = rows;
  for (auto row : layers) {
    const auto at = row.key.find("layers.{l}.");
    if (at == row.key.npos) continue;
    row.key = prefix + row.key.substr(at + 11);
    for (auto& part : row.parts) part.name = "mtp.{k}.layer." + part.name.substr(std::string("layers.{l}.").size());
    row.when += " mtp";
    row.stage = shard::Stage::Mtp;
    rows.push_back(std::move(row));
  }
}

const json* built_in(const std::string& name) {
  static const auto all = [] {
    std::map<std::string, json> out;
    for (const auto content : shardkit_embedded_families()) {
      auto one = json::parse(content);
      auto key = one["family"].get<std::string>();
      out[std::move(key)] = std::move(one);
    }
    return out;
  }();
  const auto found = all.find(name);
  return found == all.end() ? nullptr : &found->second;
}

/// What a family extends lies under it: objects key by key (null takes a key out), rows by key.
json merged(const json& own, int depth) {
  const auto base_name = text(own, "extends");
  if (base_name.empty()) return own;
  const auto* base = built_in(base_name);
  shard::require(base != nullptr && depth < kDeepestExtends, Code::BadFormat, [&] { return fmt::format("family: extends '{}', which is not built in", base_name); });
  auto out = merged(*base, depth + 1);
  auto rows = json::array();
  const auto removed = texts(own, "remove");
  std::map<std::string, json> replaced;
  if (own.contains("rows"))
    for (const auto& row : own["rows"]) replaced[text(row, "key")] = row;
  for (const auto& row : out["rows"]) {
    const auto key = text(row, "key");
    const bool gone = std::any_of(removed.begin(), removed.end(), [&](const auto& pattern) { return glob(pattern, key); });
    if (!gone && !replaced.contains(key)) rows.push_back(row);
    else if (const auto found = replaced.find(key); found != replaced.end()) {
      rows.push_back(found->second);
      replaced.erase(found);
    }
  }
  if (own.contains("rows"))
    for (const auto& row : own["rows"])
      if (replaced.contains(text(row, "key"))) rows.push_back(row);
  out.erase("remove");
  out.merge_patch(own);
  out.erase("extends");
  out.erase("remove");
  out["rows"] = std::move(rows);
  return out;
}

Family parse(const json& own) {
  shard::require(own.is_object() && !text(own, "family").empty(), Code::BadFormat, [] { return "family: the file names no 'family'"; });
  try {
    Family out;
    out.json = merged(own, 0);
    const auto& j = out.json;
    out.name = text(j, "family");
    out.about = text(j, "about");
    out.architecture = text(j, "architecture");
    out.model_types = texts(j, "model_types");
    out.recognise = text(j, "recognise");
    out.drop = texts(j, "drop");
    if (const auto prefixes = texts(j, "prefixes"); !prefixes.empty()) out.prefix = prefixes.front();
    out.window = text(j, "window");
    shard::require(std::any_of(std::begin(kWindows), std::end(kWindows), [&](const char* one) { return out.window == one; }), Code::BadFormat,
                   [&] { return fmt::format("family: window is '{}', which is no rule for sliding layers", out.window); });
    out.sparse_layers = text(j, "sparse_layers");
    out.warn = texts(j, "warn");
    for (const auto& [name, target] : {std::pair{"defaults", &out.defaults}, std::pair{"params", &out.params}, std::pair{"args", &out.args}, std::pair{"fields", &out.fields}, std::pair{"config", &out.config}}) {
      *target = j.contains(name) ? j[name] : json::object();
      shard::require(target->is_object(), Code::BadFormat, [&, name = name] { return fmt::format("family: '{}' should be an object", name); });
    }
    for (const auto& [name, value] : out.params.items()) {
      const auto is_text = [](const json& one) { return one.is_string(); };
      shard::require(is_text(value) || (value.is_array() && !value.empty() && std::all_of(value.begin(), value.end(), is_text)), Code::BadFormat,
                     [&, name = name] { return fmt::format("family: params: '{}' should be an expression, or a list of them", name); });
    }
    shard::require(j.contains("rows") && j["rows"].is_array(), Code::BadFormat, [] { return "family: the file has no 'rows'"; });
    for (const auto& row : j["rows"]) out.rows.push_back(row_of(row));
    if (const auto prefix = text(j, "mtp_layers"); !prefix.empty()) add_mtp_layers(out.rows, prefix);
    for (const auto& row : out.rows) check(row);
    return out;
  } catch (const json::exception& error) {
    shard::fail(Code::BadFormat, "family: {}", json_problem(error));
  }
}

}  // namespace

const std::vector<Family>& families() {
  static const auto all = [] {
    std::vector<Family> out;
    for (const auto content : shardkit_embedded_families()) out.push_back(parse(json::parse(content)));
    return out;
  }();
  return all;
}

Family family_named(const std::string& name) {
  for (const auto& family : families())
    if (family.name == name) return family;
  shard::require(name.ends_with(".json"), Code::NotFound, [&] { return fmt::format("--family {}: is not built in (see shardkit families), and no .json file", name); });
  const auto content = parse_json(read_text(name, kLargestFile), name);
  try {
    return parse(content);
  } catch (const shard::Error& error) {
    throw error.within(name);
  }
}

const Family* family_of_model_type(const std::string& model_type) {
  for (const auto& family : families())
    if (std::find(family.model_types.begin(), family.model_types.end(), model_type) != family.model_types.end()) return &family;
  return nullptr;
}

const Family* recognise(const shard::Params& params) {
  const Family* best = nullptr;
  for (const auto& family : families())
    if (!family.recognise.empty() && shard::holds(family.recognise, params))
      if (!best || family.recognise.size() > best->recognise.size()) best = &family;
  return best;
}

shard::Params params_of(const Family& family, const json& config) {
  shard::Params fields;
  const auto take = [&](const json& object) {
    for (const auto& [key, value] : object.items()) {
      if (value.is_boolean()) fields[key] = value.get<bool>();
      else if (value.is_number_integer()) fields[key] = value.get<shard::Index>();
      else if (value.is_null()) fields.erase(key);
    }
  };
  take(family.defaults);
  take(config);
  shard::Params out;
  for (const auto& [name, value] : family.params.items()) {
    const auto choices = value.is_array() ? value : json::array({value});
    for (const auto& choice : choices) {
      try {
        out[name] = shard::evaluate(choice.get<std::string>(), fields);
        break;
      } catch (const shard::Error&) {  // a field that config.json leaves out: the next choice, or no such parameter
      }
    }
  }
  shard::complete(out);
  return out;
}

}  // namespace formats::hf
