// What a Hugging Face folder's config.json says of its tensors.
#include "formats/hf/hf.h"
#include "formats/hf/lora.h"
#include "formats/hf/quantised.h"
#include "formats/json.h"
#include "libshard/error.h"
#include "libshard/families/megatron.h"
#include "libshard/numeric.h"
#include "libshard/translate.h"

#include <algorithm>
#include <cctype>
#include <utility>

namespace formats::hf {
namespace {

namespace fs = std::filesystem;
using shard::Code;
using shard::Finding;
using shard::Index;

constexpr std::uint64_t kLargestSmallFile = 256u << 20;

/// Names that travel with a model; anything else in the folder may be a weight in another format, or a stranger's.
constexpr const char* kSmallFiles[] = {"config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
                                       "merges.txt", "chat_template*", "*.tiktoken", "spiece.model", "sentencepiece*.model", "preprocessor_config.json"};

bool travels(const std::string& name) {
  return std::any_of(std::begin(kSmallFiles), std::end(kSmallFiles), [&](const char* pattern) { return glob(pattern, name); });
}

/// The folder's state; null where it has no config.json or no family speaks for it.
std::shared_ptr<State> state_of(const fs::path& folder, const OpenOptions& options, const std::string& embedded = "") {
  const auto path = inside(folder, "config.json");
  if (embedded.empty() && !fs::exists(path)) {
    shard::require(options.family.empty(), Code::Mismatch, [&] { return fmt::format("{}: --family needs a config.json beside the weights", folder.string()); });
    return nullptr;
  }
  const auto where = path.string();
  const auto text = embedded.empty() ? read_text(path, 16 << 20) : embedded;
  parse_json(text, where);  // refuses duplicates and depth
  auto out = std::make_shared<State>();
  out->config = nlohmann::ordered_json::parse(text);
  shard::require(out->config.is_object(), Code::BadFormat, [&] { return fmt::format("{}: is no JSON object", where); });
  if (!options.family.empty()) out->family = family_named(options.family);
  else {
    const auto type = out->config.contains("model_type") && out->config["model_type"].is_string() ? out->config["model_type"].get<std::string>() : std::string();
    const auto* family = family_of_model_type(type);
    if (!family) return nullptr;
    out->family = *family;
  }
  out->folder = folder;
  out->files = small_files(folder);
  out->rewritten = !embedded.empty();  // what the weights' own file says counts
  return out;
}

/// Configuration and tokenizer that no family speaks for travel as they are.
void take_beside(Checkpoint& checkpoint, const fs::path& folder) {
  for (const auto& name : small_files(folder)) checkpoint.beside.push_back(inside(folder, name));
}

/// Sizes are whole numbers; anything else would be taken for a field that is not there.
void check_sizes(const Family& family, const nlohmann::ordered_json& config, const std::string& where) {
  const auto check = [&](const std::string& field) {
    const auto found = config.find(field);
    if (found == config.end() || found->is_null() || found->is_boolean()) return;
    const bool fits = found->is_number_integer() && found->get<Index>() >= 0;  // from 2^63 on, they are negative
    shard::require(fits, Code::BadFormat, [&] { return fmt::format("{}: {} is {}; should be a whole number or a switch", where, field, found->dump().substr(0, 40)); });
  };
  for (const auto& entry : family.params.items())
    for (const auto& choice : entry.value().is_array() ? entry.value() : nlohmann::json::array({entry.value()})) {
      std::string word;
      for (const char c : choice.get<std::string>() + " ") {
        if (std::isalnum(static_cast<unsigned char>(c)) || c == '_') word += c;
        else check(std::exchange(word, {}));
      }
    }
}

/// A table with other rows than config.json says is none that transformers would load.
void check_vocabulary(const Checkpoint& checkpoint, const OpenOptions& options, std::vector<Finding>& findings) {
  const auto table = checkpoint.logical.tensors.find("embedding.word.weight");
  if (table == checkpoint.logical.tensors.end() || table->second.natural.empty()) return;
  const auto rows = table->second.natural[0];
  const auto add = [&](const std::string& said) { findings.push_back({"padding", Finding::Severity::Error, table->first, fmt::format("holds {} rows; {}", rows, said)}); };
  if (const auto told = checkpoint.params.find("vocab"); told != checkpoint.params.end() && told->second != rows) add(fmt::format("config.json says a vocabulary of {}", told->second));
  else if (options.vocab && *options.vocab > rows) add(fmt::format("--vocab-size {} was given", *options.vocab));
}

bool dropped(const std::vector<std::string>& patterns, const std::string& key) {
  return std::any_of(patterns.begin(), patterns.end(), [&](const auto& pattern) { return glob(pattern, key); });
}

void drop(Checkpoint& checkpoint, shard::ShardedStateDict& dict, const std::vector<std::string>& patterns, const char* why) {
  std::erase_if(dict.tensors, [&](const auto& entry) {
    const bool gone = dropped(patterns, entry.first);
    if (gone) checkpoint.not_carried.push_back({entry.first, why});
    return gone;
  });
}

/// Files of before the prefix: its rows without it, where no key has it.
std::vector<shard::Row> rows_for(const Family& family, const shard::ShardedStateDict& stored) {
  auto rows = family.rows;
  const bool prefixed = std::any_of(stored.tensors.begin(), stored.tensors.end(), [&](const auto& entry) { return entry.first.starts_with(family.prefix); });
  if (!family.prefix.empty() && !prefixed)
    for (auto& row : rows)
      if (row.key.starts_with(family.prefix)) row.key.erase(0, family.prefix.size());
  return rows;
}

/// Whether two tensors of one shard each, as safetensors hold them, have the same bytes.
bool same_bytes(const Checkpoint& checkpoint, const shard::ShardedTensor& a, const shard::ShardedTensor& b) {
  if (a.dtype != b.dtype || a.natural != b.natural || a.shards.size() != 1 || b.shards.size() != 1) return false;
  return formats::same_bytes(LocalReader(checkpoint.logical, checkpoint.files), a.shards[0].place, b.shards[0].place, static_cast<std::uint64_t>(shard::volume(a.natural)) * size_of(a.dtype));
}

constexpr const char* kHead = "output.weight";
constexpr const char* kEmbedding = "embedding.word.weight";

/// Of a tied pair safetensors.torch.save_model keeps one, which may be the head: it is both.
bool head_as_embedding(shard::ShardedStateDict& logical) {
  const auto head = logical.tensors.find(kHead);
  if (head == logical.tensors.end() || logical.tensors.contains(kEmbedding)) return false;
  auto node = logical.tensors.extract(head);
  node.key() = node.mapped().key = kEmbedding;
  logical.tensors.insert(std::move(node));
  return true;
}

/// transformers' rule: the flag ties where one of the two is stored or both are equal; a head that differs wins.
void resolve_tie(Checkpoint& checkpoint, shard::Params& params) {
  if (shard::holds("tied", params) && head_as_embedding(checkpoint.logical)) checkpoint.notes.push_back("of the embedding and the head that is tied to it, the head's key is stored; it is both");
  const auto head = checkpoint.logical.tensors.find(kHead), embedding = checkpoint.logical.tensors.find(kEmbedding);
  bool tied = shard::holds("tied", params);
  if (tied && head != checkpoint.logical.tensors.end() && embedding != checkpoint.logical.tensors.end()) {
    tied = same_bytes(checkpoint, head->second, embedding->second);
    if (tied) {
      checkpoint.not_carried.push_back({kHead, "equals the embedding that it is tied to"});
      checkpoint.logical.tensors.erase(head);
    }
  }
  params["tied"] = tied;
  checkpoint.tied = tied;
  if (tied) checkpoint.logical.ties[kHead] = kEmbedding;
}

/// The architecture that config.json names, where it is none of a causal model and the keys are not a causal model's: a base
/// model (LlamaModel) has no head and no prefix, one for classification another head.
std::string other_architecture(const State& state, const Checkpoint& checkpoint, const OpenOptions& options) {
  const auto named = state.config.find("architectures");
  if (named == state.config.end() || !named->is_array() || named->empty() || !named->front().is_string()) return {};
  const auto name = named->front().get<std::string>();
  const bool base = name.ends_with("Model") && !name.ends_with("HeadModel"), task = name.find("For") != name.npos && name.find("ForCausalLM") == name.npos;
  if (name == state.family.architecture || (!base && !task) || !options.family.empty()) return {};
  const auto params = params_of(state.family, state.config);
  const shard::Table table(rows_for(state.family, checkpoint.stored), "h");
  bool head = shard::holds("tied", params);
  for (const auto& entry : checkpoint.stored.tensors) {
    if (dropped(state.family.drop, entry.first)) continue;
    const auto match = table.match(entry.first, params);
    if (!match) return name;
    head |= match->row->vocabulary && match->row->parts.front().name == kHead;
  }
  return head ? "" : name;
}

struct Held final : ComputedBytes {
  std::vector<std::byte> bytes;
  void read(std::uint64_t offset, std::span<std::byte> into) const override { std::copy_n(bytes.begin() + static_cast<std::ptrdiff_t>(offset), into.size(), into.begin()); }
};

/// A router's selection bias is F32 by rule, in Megatron and when transformers loads it; a model cast as a whole stores it
/// narrower. Its few values are widened here, so that digests and every target see one tensor.
void widen_selection_bias(Checkpoint& checkpoint) {
  const LocalReader reader(checkpoint.logical, checkpoint.files);
  for (auto& [key, tensor] : checkpoint.logical.tensors) {
    if (!key.ends_with("router.expert_bias") || tensor.dtype == shard::DType::F32 || !is_floating(tensor.dtype) || tensor.shards.size() != 1) continue;
    const auto count = static_cast<std::size_t>(shard::volume(tensor.global_shape));
    std::vector<std::byte> narrow(count * size_of(tensor.dtype));
    const auto& place = tensor.shards[0].place;
    reader.read(place.stream, place.offset, narrow);
    auto held = std::make_shared<Held>();
    held->bytes.resize(count * sizeof(float));
    shard::cast(narrow, tensor.dtype, held->bytes, shard::DType::F32);
    const auto file = checkpoint.files->add(std::shared_ptr<const ComputedBytes>(held));
    checkpoint.logical.files.resize(file + 1);
    checkpoint.logical.files[file] = key;
    tensor.dtype = shard::DType::F32;
    checkpoint.widened[static_cast<std::uint32_t>(checkpoint.logical.streams.size())] = place;
    tensor.shards[0].place = {static_cast<std::uint32_t>(checkpoint.logical.streams.size()), 0, {static_cast<Index>(sizeof(float))}};
    checkpoint.logical.streams.push_back({file, 0, held->bytes.size(), std::nullopt, false});
  }
}

/// transformers leaves out biases that config.json does not switch on.
void refuse_biases(const Checkpoint& checkpoint, const shard::Params& params, std::vector<Finding>& findings) {
  constexpr std::pair<std::string_view, const char*> kBiases[] = {{".attention.q.bias", "qkv_bias"}, {".attention.k.bias", "qkv_bias"}, {".attention.v.bias", "qkv_bias"}, {".attention.out.bias", "out_bias"},
                                                                  {".mlp.gate.bias", "mlp_bias"},    {".mlp.up.bias", "mlp_bias"},      {".mlp.down.bias", "mlp_bias"}};
  for (const auto& [key, tensor] : checkpoint.logical.tensors)
    for (const auto& [end, param] : kBiases)
      if (key.starts_with("layers.") && key.ends_with(end) && !shard::holds(param, params))
        findings.push_back({"unexpected", Finding::Severity::Error, key, "config.json says that there is no such bias"});
}

/// Quantised weights that stay as they are keep their own keys: no logical tensor is made of numbers without their scales.
void keep_pairs(Checkpoint& checkpoint, const std::vector<QuantisedPair>& pairs, std::uint32_t first_computed, std::size_t end_computed) {
  auto& tensors = checkpoint.logical.tensors;
  const auto computed = [&](const shard::Shard& shard) { return shard.place.stream >= first_computed && shard.place.stream < end_computed; };
  for (auto at = tensors.begin(); at != tensors.end();) {
    const bool any = std::erase_if(at->second.shards, computed) > 0;
    at = any && at->second.shards.empty() ? tensors.erase(at) : std::next(at);
  }
  for (const auto& pair : pairs)
    for (const auto& key : {pair.weight, pair.scale}) {
      tensors[key] = checkpoint.stored.tensors.at(key);
      checkpoint.quantised.insert(key);
    }
}

void say_dtype(State& state, shard::DType dtype) {
  state.config.erase("quantization_config");
  state.config[state.config.contains("dtype") ? "dtype" : "torch_dtype"] = shard::torch_name(dtype);
  state.rewritten = true;
}

}  // namespace

std::vector<std::string> small_files(const fs::path& folder) {
  std::vector<std::string> out;
  for (const auto& entry : fs::directory_iterator(folder)) {
    const auto name = entry.path().filename().string();
    std::error_code error;  // a link that leads nowhere is no file
    if (travels(name) && entry.is_regular_file(error) && entry.file_size(error) <= kLargestSmallFile) out.push_back(name);
  }
  std::sort(out.begin(), out.end());
  return out;
}

void name_others(Checkpoint& checkpoint, const OpenOptions& options) {
  constexpr std::size_t kMost = 100;
  std::set<std::string> used{"model.safetensors.index.json", ".metadata"};
  for (const auto& name : checkpoint.stored.files)
    if (!name.empty()) used.insert(fs::path(name).begin()->string());
  for (const auto& path : checkpoint.beside) used.insert(path.filename().string());
  if (checkpoint.hf) used.insert(checkpoint.hf->files.begin(), checkpoint.hf->files.end());
  for (const auto& one : checkpoint.not_carried) used.insert(one.key);
  if (checkpoint.adapter) {
    const auto carried = small_files(checkpoint.folder);
    used.insert(carried.begin(), carried.end());
  }
  if (checkpoint.adapter || !options.adapter.empty()) used.insert({"adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"});
  const bool by_ranks = checkpoint.format == "dcp" && !fs::exists(checkpoint.folder / ".metadata");  // each rank's part of it was read
  std::set<std::string> others;
  std::size_t more = 0;
  for (const auto& entry : fs::directory_iterator(checkpoint.folder)) {
    const auto name = entry.path().filename().string();
    if (used.contains(name)) continue;
    if (by_ranks && name.starts_with("__") && name.ends_with(".metadata")) continue;
    others.insert(name);
    if (others.size() <= kMost) continue;
    others.erase(std::prev(others.end()));
    ++more;
  }
  for (const auto& name : others) {
    std::error_code error;
    const auto path = checkpoint.folder / name;
    const auto size = fs::is_regular_file(path, error) ? fs::file_size(path, error) : 0;
    checkpoint.not_carried.push_back({name, fs::is_directory(path, error)          ? "a folder beside the weights"
                                            : !fs::is_regular_file(path, error)    ? "no regular file"
                                            : travels(name) && size > kLargestSmallFile ? fmt::format("{} bytes; files of at most {} travel with a model", size, kLargestSmallFile)
                                                                                   : "neither weights that were read nor configuration or tokenizer"});
  }
  if (more > 0) checkpoint.not_carried.push_back({fmt::format("{} more files", more), "beside the weights; the first by name are listed"});
}

void interpret(Checkpoint& checkpoint, const OpenOptions& options) {
  if (checkpoint.metadata.contains("DCP_SHARDING_INFO")) {
    take_beside(checkpoint, checkpoint.folder);
    shard::require(options.adapter.empty(), Code::BadFormat, [&] { return fmt::format("{}: lies in shards of torch's own; convert it to hf before an adapter is merged", checkpoint.folder.string()); });
    return;
  }
  auto state = state_of(checkpoint.folder, options, checkpoint.embedded_config);
  if (const auto other = state ? other_architecture(*state, checkpoint, options) : std::string(); !other.empty()) {
    const auto why = fmt::format("{} is no architecture that is converted; tensors keep their own keys", other);
    checkpoint.findings.push_back({"unverifiable", Finding::Severity::Note, "config.json", why});
    checkpoint.notes.push_back(why);
    state = nullptr;
  }
  if (!state) {
    std::vector<Finding> ignored;
    shard::require(!options.dequantise || quantised_pairs(checkpoint.stored, nlohmann::ordered_json::object(), ignored).empty(), Code::BadFormat,
                   [&] { return fmt::format("{}: holds quantised weights, which --dtype cannot read without a config.json of a known family", checkpoint.folder.string()); });
    shard::require(options.adapter.empty(), Code::BadFormat, [&] { return fmt::format("{}: an adapter needs a config.json of a known family to be merged by", checkpoint.folder.string()); });
    take_beside(checkpoint, checkpoint.folder);
    return;
  }
  const auto& family = state->family;
  if (!checkpoint.embedded_config.empty() && !fs::is_directory(checkpoint.path)) state->files.clear();  // a file alone: others beside it are not its own
  checkpoint.hf = state;
  checkpoint.family = family.name;
  if (options.adapter.empty() && is_adapter(checkpoint.folder)) checkpoint.not_carried.push_back({"adapter_config.json", "a LoRA adapter beside the weights; --merge-lora merges it"});
  auto& params = checkpoint.params;
  check_sizes(family, state->config, (checkpoint.folder / "config.json").string());
  params = params_of(family, state->config);
  for (const auto& [name, value] : options.parameters) params[name] = value;
  if (const auto vocab = params.find("vocab"); vocab != params.end()) checkpoint.vocab = vocab->second;
  take_vocabulary(checkpoint, options);
  constexpr const char* kBuffer = "a buffer, computed when a model is built";
  drop(checkpoint, checkpoint.stored, family.drop, kBuffer);
  std::erase_if(checkpoint.findings, [&](const Finding& finding) {  // nor need an index list it
    const bool buffer = finding.rule == "unexpected" && finding.severity == Finding::Severity::Error && dropped(family.drop, finding.key);
    if (buffer) checkpoint.not_carried.push_back({finding.key, kBuffer});
    return buffer;
  });
  drop(checkpoint, checkpoint.stored, options.drop, "--drop");
  std::vector<Finding> findings;
  const auto pairs = quantised_pairs(checkpoint.stored, state->config, findings);
  auto weights = checkpoint.stored;  // with every pair as the one tensor that it stands for
  std::uint32_t first_computed = 0;
  if (!pairs.empty()) weights = dequantised(checkpoint, pairs, options.dequantise, first_computed);
  const auto end_computed = weights.streams.size();
  if (!pairs.empty() && options.dequantise) {
    checkpoint.stored = weights;
    say_dtype(*state, *options.dequantise);
  }
  if (!options.adapter.empty()) {
    shard::require(pairs.empty() || options.dequantise, Code::BadFormat,
                   [&] { return fmt::format("{}: holds quantised weights, to which no adapter can be added; --dtype bf16, f16 or f32 dequantises", checkpoint.folder.string()); });
    refuse(findings);
    merge_adapter(checkpoint, open_adapter(options.adapter, {}), family, rows_for(family, checkpoint.stored));
    weights = checkpoint.stored;
  }
  const shard::Table table(rows_for(family, weights), "h");
  auto translation = to_logical(weights, table, params, {}, findings);
  checkpoint.logical = std::move(translation.logical);
  drop(checkpoint, checkpoint.logical, options.drop, "--drop");
  const bool tied = shard::holds("tied", params);
  resolve_tie(checkpoint, params);
  if (tied && !*checkpoint.tied && !options.adapter.empty()) {  // the adapter parted head and embedding
    state->config["tie_word_embeddings"] = false;
    state->rewritten = true;
  }
  if (options.places) widen_selection_bias(checkpoint);
  const Index layers = translation.layers, experts = translation.experts;
  Index depths = translation.depths;
  const auto holds_depth = [&](Index k) {
    const auto prefix = fmt::format("mtp.{}.", k);
    const auto found = checkpoint.logical.tensors.lower_bound(prefix);
    return found != checkpoint.logical.tensors.end() && found->first.starts_with(prefix);
  };
  while (depths > 0 && !holds_depth(depths - 1)) --depths;  // --drop 'mtp.*'
  if (params.contains("mtp") && params.at("mtp") > 0 && depths == 0) {
    findings.push_back({"missing", Finding::Severity::Warning, "mtp.0", fmt::format("config.json says {} MTP layers; none is here: transformers saves such models without them", params.at("mtp"))});
    params["mtp"] = 0;
  }
  check_vocabulary(checkpoint, options, findings);
  for (const auto& [name, what, held] : {std::tuple{"layers", "layers", layers}, std::tuple{"experts", "experts", experts}, std::tuple{"mtp", "MTP layers", depths}})
    if (const auto told = params.contains(name) ? params.at(name) : 0; told != held)
      findings.push_back({told > held ? "missing" : "unexpected", Finding::Severity::Error, fmt::format("{}.{}", name, std::min(told, held)),
                          fmt::format("the checkpoint holds {} {}; {} {}", held, what, options.parameters.contains(name) ? "the command line says" : "config.json says", told)});
  check_expected(checkpoint.logical, table, params, {nullptr, layers, experts, depths}, findings);
  for (const auto& [key, tensor] : checkpoint.logical.tensors) {
    check_cover(tensor, findings, 2);
    if (tensor.dtype >= shard::DType::I64 && tensor.dtype <= shard::DType::Bool) findings.push_back({"dtype", Finding::Severity::Error, key, fmt::format("is {}; weights of {} are floating numbers", shard::name(tensor.dtype), family.name)});
  }
  refuse_biases(checkpoint, params, findings);
  if (const auto bias = state->config.find("attention_bias"); shard::holds("mla", params) && bias != state->config.end() && *bias == true)
    findings.push_back({"missing", Finding::Severity::Error, "layers.0.attention.q_down.bias", "config.json says attention_bias; biases of latent attention are not supported"});
  if (!pairs.empty() && !options.dequantise) keep_pairs(checkpoint, pairs, first_computed, end_computed);
  checkpoint.findings.insert(checkpoint.findings.end(), findings.begin(), findings.end());
  checkpoint.sizes = {layers, experts, depths};
}

std::set<std::string> repeated_heads(const Checkpoint& source) {
  std::set<std::string> heads;
  if (!source.hf || source.megatron || !source.tied.value_or(false)) return heads;
  const shard::Table table(rows_for(source.hf->family, source.stored), "h");
  bool embedding = false;
  for (const auto& entry : source.stored.tensors)
    if (const auto match = table.match(entry.first, source.params); match && match->row->vocabulary) {
      if (match->row->parts.front().name == kHead) heads.insert(entry.first);
      else embedding |= match->row->parts.front().name == kEmbedding;
    }
  if (!embedding) heads.clear();
  return heads;
}

shard::ShardedStateDict logical_of(const Checkpoint& source, const shard::ShardedStateDict& stored, std::vector<Finding>& findings) {
  const shard::Table table(rows_for(source.hf->family, stored), "h");
  auto out = to_logical(stored, table, source.params, source.quantised, findings).logical;
  if (source.tied.value_or(false)) head_as_embedding(out);
  for (const auto& key : source.quantised) out.tensors[key] = stored.tensors.at(key);
  return out;
}

void take_up_carried(Checkpoint& checkpoint, const OpenOptions& options) {
  if (!checkpoint.megatron) return;
  const auto folder = checkpoint.folder.parent_path() / "hf";
  if (fs::is_directory(folder)) {
    checkpoint.hf = state_of(inside(checkpoint.folder.parent_path(), "hf"), options);
    if (!checkpoint.hf) take_beside(checkpoint, folder);
  }
  else if (!options.family.empty()) checkpoint.hf = std::make_shared<State>(State{family_named(options.family), {}, {}, {}});
  if (!checkpoint.hf || checkpoint.hf->config.is_null()) return;
  if (checkpoint.vocab && (!options.vocab || checkpoint.recorded_vocab)) return;
  if (const auto params = params_of(checkpoint.hf->family, checkpoint.hf->config); params.contains("vocab")) {
    checkpoint.vocab = params.at("vocab");
    take_vocabulary(checkpoint, options);
  }
}

}  // namespace formats::hf
