// Opening a PEFT folder: keys into modules, and every way in which factors and adapter_config.json can contradict each other.
#include "formats/hf/lora.h"

#include "formats/hf/hf.h"
#include "formats/pattern.h"
#include "formats/plain.h"
#include "formats/safetensors/reader.h"
#include "formats/text_splits.h"
#include "libshard/error.h"
#include "libshard/numeric.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace formats::hf {
namespace {

namespace fs = std::filesystem;
using shard::Finding;
using shard::Index;

constexpr const char* kConfig = "adapter_config.json";
constexpr std::string_view kPrefix = "base_model.model.", kWeight = ".weight";
constexpr std::uint32_t kMostSteps = 100'000;  // of a pattern on one module
constexpr std::size_t kMostExpressions = 1000;

/// The module is `name`, or ends with it behind a dot: how PEFT reads its lists.
bool ends_in(std::string_view module, std::string_view name) {
  return module == name || (module.size() > name.size() && module.ends_with(name) && module[module.size() - name.size() - 1] == '.');
}

/// The same of a name as a regular expression, where a dot is any letter.
bool fits_end(std::string_view module, std::string_view name) {
  if (module.size() < name.size() || (module.size() > name.size() && module[module.size() - name.size() - 1] != '.')) return false;
  module.remove_prefix(module.size() - name.size());
  return std::equal(module.begin(), module.end(), name.begin(), [](char there, char asked) { return there == asked || (asked == '.' && there != '\n'); });
}

/// A table of module patterns as PEFT reads it: regular expressions for the end of a module's path; the first that fits counts.
template <typename Value>
class Patterns {
 public:
  Patterns(const std::vector<std::pair<std::string, Value>>& entries, const char* name) {
    std::size_t expressions = 0;
    for (const auto& [text, value] : entries) {
      const bool plain = text.find_first_of("\\^$*+?()[]{}|") == text.npos;
      shard::require(plain || ++expressions <= kMostExpressions, shard::Code::BadFormat, [&] { return fmt::format("{}: {} holds more than {} regular expressions", kConfig, name, kMostExpressions); });
      all_.push_back({text, plain ? std::nullopt : std::optional(Pattern(R"(\A(?:.*\.)?(?:)" + text + R"()\z)", fmt::format("{}: {}", kConfig, name), kMostSteps)), value});
    }
  }
  Value of(const std::string& module, Value otherwise) const {
    for (const auto& one : all_)
      if (one.pattern ? one.pattern->next(module, 0).first != module.npos : fits_end(module, one.text)) return one.value;
    return otherwise;
  }

 private:
  struct Entry {
    std::string text;
    std::optional<Pattern> pattern;
    Value value;
  };
  std::vector<Entry> all_;
};

/// A key of the file, taken apart.
struct Spelling {
  enum class Kind { FactorA, FactorB, Plain, Unknown } kind = Kind::Plain;
  std::string name;     ///< module of a factor; the base's tensor
  std::string adapter;  ///< "default" and the like; "" where it is left out, as PEFT does
  bool embedding = false;
};

Spelling spelling_of(std::string_view key) {
  if (key.starts_with(kPrefix)) key.remove_prefix(kPrefix.size());
  Spelling out;
  if (const auto at = key.rfind(".lora_"); at != key.npos) {
    out.name = key.substr(0, at);
    auto rest = key.substr(at + 6);
    out.embedding = rest.starts_with("embedding_");
    if (out.embedding) rest.remove_prefix(10);
    out.kind = rest.starts_with('A') ? Spelling::Kind::FactorA : rest.starts_with('B') ? Spelling::Kind::FactorB : Spelling::Kind::Unknown;
    if (!rest.empty()) rest.remove_prefix(1);
    const bool ended = out.embedding || rest.ends_with(kWeight);
    if (ended && !out.embedding) rest.remove_suffix(kWeight.size());
    if (rest.starts_with('.')) out.adapter = rest.substr(1);
    if (!ended || (!rest.empty() && (out.adapter.empty() || out.adapter.find('.') != rest.npos))) out.kind = Spelling::Kind::Unknown;
    return out;
  }
  out.name = key;
  constexpr std::string_view kBase = ".base_layer.", kSaved = ".modules_to_save.";
  if (const auto at = out.name.rfind(kBase); at != out.name.npos) {
    out.name.replace(at, kBase.size(), ".");
  } else if (const auto saved = out.name.rfind(kSaved); saved != out.name.npos) {
    const auto from = saved + kSaved.size(), end = out.name.find('.', from);
    if (end == out.name.npos) out.kind = Spelling::Kind::Unknown;
    else out.adapter = out.name.substr(from, end - from), out.name.erase(saved, end - saved);
  }
  return out;
}

/// The pieces of an adapter, put together and held against its configuration.
class Assembly {
 public:
  Assembly(Checkpoint& checkpoint, Adapter& adapter) : checkpoint_(checkpoint), adapter_(adapter), config_(adapter.config) {}

  void run() {
    for (const auto& [key, tensor] : checkpoint_.stored.tensors) sort(key);
    const Patterns<Index> ranks(config_.ranks, "rank_pattern");
    const Patterns<double> alphas(config_.alphas, "alpha_pattern");
    for (const auto& [name, both] : factors_) {
      const auto rank = ranks.of(name, config_.rank);
      if (!fits(name, both, rank)) continue;
      const auto alpha = alphas.of(name, config_.alpha), divisor = static_cast<double>(rank);
      adapter_.modules.push_back({name, both.a->key, both.b->key, both.embedding, alpha / (config_.root ? std::sqrt(divisor) : divisor)});
    }
    check_targets();
    if (factors_.empty()) error("missing", "lora_A", "the file holds no factors");
  }

 private:
  struct Both {
    const shard::ShardedTensor *a = nullptr, *b = nullptr;
    bool embedding = false;
  };

  void found(const char* rule, Finding::Severity severity, const std::string& key, std::string message) { checkpoint_.findings.push_back({rule, severity, key, std::move(message)}); }
  void error(const char* rule, const std::string& key, std::string message) { found(rule, Finding::Severity::Error, key, std::move(message)); }

  void sort(const std::string& key) {
    const auto spelled = is_utf8(key) ? spelling_of(key) : Spelling{Spelling::Kind::Unknown, {}, {}, false};
    if (spelled.kind == Spelling::Kind::Unknown || spelled.name.empty()) return error("unexpected", key, "is neither a factor of LoRA nor a tensor of the base");
    if (!spelled.adapter.empty() && adapter_name_.empty()) adapter_name_ = spelled.adapter;
    if (!spelled.adapter.empty() && spelled.adapter != adapter_name_) return error("unexpected", key, fmt::format("belongs to adapter '{}'; others here belong to '{}'", spelled.adapter, adapter_name_));
    if (spelled.kind == Spelling::Kind::Plain) {
      if (!adapter_.replaced.emplace(spelled.name, key).second) error("unexpected", key, fmt::format("is the base's {} once more", spelled.name));
      return;
    }
    auto& both = factors_[spelled.name];
    if ((both.a || both.b) && both.embedding != spelled.embedding) return error("unexpected", key, "its module has factors of a linear layer and of an embedding");
    both.embedding = spelled.embedding;
    auto& one = spelled.kind == Spelling::Kind::FactorA ? both.a : both.b;
    if (one) return error("unexpected", key, fmt::format("is {} once more", one->key));
    one = &checkpoint_.stored.tensors.at(key);
  }

  bool fits(const std::string& name, const Both& both, Index rank) {
    const auto before = checkpoint_.findings.size();
    if (!both.a) error("missing", name, fmt::format("{} is here, lora_A is not", both.b->key));
    if (!both.b) error("missing", name, fmt::format("{} is here, lora_B is not", both.a->key));
    for (const auto* factor : {both.a, both.b}) {
      if (!factor) continue;
      const auto& shape = factor->global_shape;
      if (!shard::castable(factor->dtype, shard::DType::F32)) error("dtype", factor->key, fmt::format("is {}; factors are floating numbers", shard::name(factor->dtype)));
      if (shape.size() != 2 || shape[0] < 1 || shape[1] < 1) error("shape", factor->key, fmt::format("shape is {}; a factor has rows and columns", shard::to_string(shape)));
      else if (const auto held = shape[factor == both.a ? 0 : 1]; held != rank)
        error("shape", factor->key, fmt::format("has rank {}; {} gives {}", held, kConfig, rank));
    }
    if (const auto why = untouched(name); !why.empty()) error("unexpected", name, fmt::format("{}: PEFT would leave it as it is", why));
    return checkpoint_.findings.size() == before;
  }

  /// Why PEFT, which goes by the configuration, would not adapt the module; "" where it would.
  std::string untouched(const std::string& module) {
    const auto listed = [&](const auto& names) { return std::any_of(names.begin(), names.end(), [&](const auto& name) { return ends_in(module, name); }); };
    if (listed(config_.excluded) || fits(excluded_, config_.excluded_pattern, "exclude_modules", module)) return fmt::format("{} names it among exclude_modules", kConfig);
    const bool named = config_.target_pattern.empty() ? listed(config_.targets) : config_.target_pattern == "all-linear" || fits(target_, config_.target_pattern, "target_modules", module);
    if (!named) return fmt::format("{} does not name it among target_modules", kConfig);
    if (config_.layers.empty()) return {};
    const auto layer = layer_of(module);
    const bool chosen = layer && std::find(config_.layers.begin(), config_.layers.end(), *layer) != config_.layers.end();
    return chosen ? std::string() : fmt::format("{} does not name its layer among layers_to_transform", kConfig);
  }

  bool fits(std::optional<Pattern>& pattern, const std::string& text, const char* field, const std::string& module) {
    if (text.empty()) return false;
    if (!pattern) pattern.emplace("\\A(?:" + text + ")\\z", fmt::format("{}: {}", kConfig, field), kMostSteps);
    return pattern->next(module, 0).first != module.npos;
  }

  /// The number between dots that PEFT takes for the layer's: the first behind one of layers_pattern, else behind two names.
  std::optional<Index> layer_of(const std::string& module) {
    if (lists_.empty()) {
      const auto add = [&](const std::string& name) { lists_.emplace_back("\\A" + name + "\\.[0-9]{1,9}\\.", fmt::format("{}: layers_pattern", kConfig), kMostSteps); };
      for (const auto& name : config_.layer_lists) add("(?:.*?\\.)?" + name);
      if (lists_.empty()) add(".*?\\.[^.]*");
    }
    for (const auto& list : lists_)
      if (const auto [begin, end] = list.next(module, 0); begin != module.npos) return std::stoll(module.substr(module.rfind('.', end - 2) + 1));
    return std::nullopt;
  }

  /// PEFT lets a list name modules that a model lacks, so these are warnings.
  void check_targets() {
    for (const auto& name : config_.targets)
      if (std::none_of(factors_.begin(), factors_.end(), [&](const auto& entry) { return ends_in(entry.first, name); }))
        found("missing", Finding::Severity::Warning, name, "target_modules names it; no factor is its");
    for (const auto& name : config_.saved) {
      const auto holds = [&](const auto& entry) {
        for (auto at = entry.first.find('.'); at != entry.first.npos; at = entry.first.find('.', at + 1))
          if (ends_in(std::string_view(entry.first).substr(0, at), name)) return true;
        return false;
      };
      if (std::none_of(adapter_.replaced.begin(), adapter_.replaced.end(), holds)) found("missing", Finding::Severity::Warning, name, "modules_to_save names it; no tensor is its");
    }
  }

  Checkpoint& checkpoint_;
  Adapter& adapter_;
  const LoraConfig& config_;
  std::map<std::string, Both> factors_;  ///< by module
  std::string adapter_name_;
  std::optional<Pattern> target_, excluded_;
  std::vector<Pattern> lists_;
};

}  // namespace

bool is_adapter(const fs::path& folder) { return fs::exists(folder / kConfig); }
bool is_bare_adapter(const fs::path& folder) { return is_adapter(folder) && !safetensors::matches(folder); }

Checkpoint open_adapter(const fs::path& folder, const OpenOptions& options) {
  auto adapter = std::make_shared<Adapter>(Adapter{read_lora_config(folder), {}, {}});
  const auto safetensors = folder / "adapter_model.safetensors", pickled = folder / "adapter_model.bin";
  const bool modern = fs::exists(safetensors);
  shard::require(modern || fs::exists(pickled), shard::Code::NotFound, [&] { return fmt::format("{}: not found; an adapter's weights should lie beside its {}", safetensors.string(), kConfig); });
  auto out = modern ? safetensors::open(safetensors, options) : open_torch_file(inside(folder, "adapter_model.bin"), options);
  out.format = "hf";
  out.path = out.folder = folder;
  Assembly(out, *adapter).run();
  out.adapter = std::move(adapter);
  return out;
}

void create_adapter(const fs::path& path, const Checkpoint& source, const TargetOptions& options, Target& target) {
  target.writer = make_writer(path, options);
  write_safetensors(target, same_keys(source, options), std::numeric_limits<std::uint64_t>::max(), source.metadata, "adapter_model");
  for (const auto& object : source.stored.objects) target.dropped.push_back({object.key, "safetensors hold only tensors"});
  auto& folder = target.writer->folder();
  auto files = small_files(source.folder);
  files.push_back(kConfig);
  for (const auto& name : files) {
    folder.write(folder.add(name), 0, read_text(inside(source.folder, name)));
    target.carried.push_back(name);
  }
  join(source, target);
}

}  // namespace formats::hf
