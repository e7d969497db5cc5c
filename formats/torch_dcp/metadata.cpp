// The Metadata object of torch.distributed.checkpoint as plain data.
#include "formats/torch_dcp/metadata.h"

#include "formats/torch_save.h"
#include "libshard/error.h"

#include <algorithm>
#include <charconv>
#include <set>
#include <tuple>
#include <unordered_map>
#include <unordered_set>

namespace formats::torch_dcp {
namespace {

using pickle::Graph;
using pickle::Kind;
using pickle::Ref;
using shard::Code;

constexpr std::uint64_t kMostBytes = 2ull << 30;
constexpr const char* kMetadata = "torch.distributed.checkpoint.metadata";

Ref need(const Graph& g, Ref object, std::string_view name) {
  const auto found = g.kind(object) == Kind::Object ? g.attribute(object, name) : std::nullopt;
  shard::require(found.has_value(), Code::BadFormat, [&] { return fmt::format(".metadata: '{}' is missing", name); });
  return *found;
}

shard::Shape need_shape(const Graph& g, Ref ref, std::string_view what) {
  auto shape = shape_of(g, ref);
  shard::require(shape.has_value(), Code::BadFormat, [&] { return fmt::format(".metadata: {} is no torch.Size", what); });
  for (const auto size : *shape)
    shard::require(size >= 0, Code::BadFormat, [&] { return fmt::format(".metadata: {} holds {}; should not be negative", what, size); });
  return std::move(*shape);
}

std::uint64_t natural(const Graph& g, Ref ref, std::string_view what) {
  const auto value = g.integer(ref);
  shard::require(value >= 0, Code::BadFormat, [&] { return fmt::format(".metadata: {} is {}; should not be negative", what, value); });
  return static_cast<std::uint64_t>(value);
}

std::string index_key(std::string_view fqn, const shard::Shape* offset) {
  std::string key(fqn);
  key += '\0';
  if (offset)
    for (const auto lo : *offset) key.append(std::to_string(lo)).append(",");
  else
    key += '-';
  return key;
}

/// What an index_key stands for, for messages.
std::string chunk_name(std::string_view index) {
  const auto nul = index.find('\0');
  const auto key = index.substr(0, nul), at = index.substr(nul + 1);
  return at == "-" ? std::string(key) : fmt::format("{} at [{}]", key, at.substr(0, at.empty() ? 0 : at.size() - 1));
}

class Parser {
 public:
  explicit Parser(const std::filesystem::path& folder) : folder_(folder) {}

  Metadata parse(const Graph& g) {
    shard::require(g.kind(g.root) == Kind::Object && g.kind(g.callable(g.root)) == Kind::Symbol &&
                       g.name(g.callable(g.root)).ends_with("Metadata"),
                   Code::BadFormat, [] { return ".metadata: is not a Metadata object"; });
    storage(g, need(g, g.root, "storage_data"));
    const auto dict = need(g, g.root, "state_dict_metadata");
    const auto entries = g.items(dict);
    for (std::size_t i = 0; i + 1 < entries.size(); i += 2) {
      const std::string key(g.text(entries[i]));
      const auto value = entries[i + 1];
      shard::require(!out_.tensors.contains(key) && !out_.bytes.contains(key), Code::BadFormat,
                     [&] { return fmt::format(".metadata: key '{}' stands twice", key); });
      if (g.is_object(value, kMetadata, "BytesStorageMetadata")) out_.bytes[key] = take(key, nullptr);
      else tensor(g, key, value);
    }
    find_unused();
    find_shared();
    tell_untold();
    if (const auto paths = g.attribute(g.root, "planner_data")) nesting(g, *paths);
    if (const auto extra = g.attribute(g.root, "mcore_data")) flattened(g, *extra);
    return std::move(out_);
  }

 private:
  void storage(const Graph& g, Ref dict) {
    const auto entries = g.items(dict);
    for (std::size_t i = 0; i + 1 < entries.size(); i += 2) {
      const auto index = entries[i], info = entries[i + 1];
      const auto fqn = g.text(need(g, index, "fqn"));
      const auto offset = g.attribute(index, "offset");
      std::optional<shard::Shape> lo;
      if (offset && !g.is_none(*offset)) lo = need_shape(g, *offset, "a chunk's offset");
      const auto [at, fresh] = items_.emplace(index_key(fqn, lo ? &*lo : nullptr), Stored{item(g, info), false});
      shard::require(fresh, Code::BadFormat,
                     [&] { return fmt::format("{}: two items for one chunk{}", fqn, lo ? " at " + shard::to_string(*lo) : ""); });
    }
  }

  void found(const char* rule, std::string key, std::string message) {
    constexpr std::size_t kMost = 8;
    if (++found_[rule] <= kMost) out_.findings.push_back({rule, shard::Finding::Severity::Error, std::move(key), std::move(message)});
    else ++untold_[rule];
  }
  void tell_untold() {
    for (const auto& [rule, count] : untold_) out_.findings.push_back({rule, shard::Finding::Severity::Error, ".metadata", fmt::format("{} more of this kind", count)});
  }

  /// What state_dict_metadata does not name would be lost in silence.
  void find_unused() {
    std::map<std::string, const Item*> lost;
    for (const auto& [index, stored] : items_)
      if (!stored.taken) lost[chunk_name(index)] = &stored.item;
    for (const auto& [name, item] : lost)
      found("coverage", name, fmt::format("is stored in {}, but state_dict_metadata names no such chunk", out_.files[item->file]));
  }

  /// Writers put items one behind the other: where two share bytes, one is read as the other.
  void find_shared() {
    std::vector<const std::pair<const std::string, Stored>*> order;
    for (const auto& entry : items_)
      if (entry.second.item.length > 0) order.push_back(&entry);
    const auto place = [](const auto* entry) { return std::tie(entry->second.item.file, entry->second.item.offset, entry->first); };
    std::sort(order.begin(), order.end(), [&](const auto* a, const auto* b) { return place(a) < place(b); });
    for (std::size_t i = 1; i < order.size(); ++i) {
      const auto &a = order[i - 1]->second.item, &b = order[i]->second.item;
      if (a.file == b.file && b.offset - a.offset < a.length)
        found("overlap", chunk_name(order[i]->first),
              fmt::format("its item is bytes {}+{} of {}; {} has {}+{} of them, too", b.offset, b.length, out_.files[b.file], chunk_name(order[i - 1]->first), a.offset, a.length));
    }
  }

  Item item(const Graph& g, Ref info) {
    Item out;
    out.file = file(g.text(need(g, info, "relative_path")));
    out.offset = natural(g, need(g, info, "offset"), "an item's offset");
    out.length = natural(g, need(g, info, "length"), "an item's length");
    if (const auto list = g.attribute(info, "transform_descriptors"); list && !g.is_none(*list))
      for (const auto name : g.items(*list)) {
        shard::require(!out.zstd && g.text(name).starts_with("stream.zstd") && g.text(name).ends_with("/1"), Code::BadFormat,
                       [&] { return fmt::format(".metadata: transform '{}' is not supported; stream.zstd/1 is", g.text(name)); });
        out.zstd = true;
      }
    return out;
  }

  std::uint32_t file(std::string_view name) {
    const auto found = files_.find(std::string(name));
    if (found != files_.end()) return found->second;
    inside(folder_, name);
    out_.files.emplace_back(name);
    return files_[std::string(name)] = static_cast<std::uint32_t>(out_.files.size() - 1);
  }

  /// `chunk`: of a tensor, null for a bytes item.
  Item take(const std::string& key, const shard::Box* chunk) {
    const auto at = items_.find(index_key(key, chunk ? &chunk->lo : nullptr));
    shard::require(at != items_.end(), Code::BadFormat, [&] {
      return fmt::format("{}: no stored item for its chunk{}", key, chunk ? " at " + shard::to_string(chunk->lo) : "");
    });
    // Empty chunks of several ranks may begin at one place.
    if (at->second.taken && chunk && !shard::empty(*chunk)) found("overlap", key, fmt::format("chunk {} is listed twice", shard::to_string(*chunk)));
    at->second.taken = true;
    return at->second.item;
  }

  void tensor(const Graph& g, const std::string& key, Ref value) {
    Tensor out{shard::DType::F32, need_shape(g, need(g, value, "size"), key), {}};
    shard::volume(out.shape);
    const auto properties = need(g, value, "properties");
    const auto state = g.state(properties);
    shard::require(state.has_value() && g.kind(*state) == Kind::Tuple && !g.items(*state).empty(), Code::BadFormat,
                   [&] { return fmt::format("{}: tensor properties are malformed", key); });
    const auto dtype = dtype_of(g, g.items(*state)[0]);
    shard::require(dtype.has_value(), Code::BadFormat, [&] {
      const auto ref = g.items(*state)[0];
      return g.kind(ref) == Kind::Symbol ? fmt::format("{}: its dtype {} is not supported", key, g.name(ref)) : fmt::format("{}: has no dtype", key);
    });
    out.dtype = *dtype;
    for (const auto chunk : g.items(need(g, value, "chunks"))) {
      Chunk one{{need_shape(g, need(g, chunk, "offsets"), key), need_shape(g, need(g, chunk, "sizes"), key)}, {}};
      shard::require(one.box.lo.size() == out.shape.size() && one.box.size.size() == out.shape.size(), Code::BadFormat,
                     [&] { return fmt::format("{}: a chunk has another number of dimensions than {}", key, shard::to_string(out.shape)); });
      for (std::size_t d = 0; d < out.shape.size(); ++d)
        shard::require(one.box.size[d] <= out.shape[d] && one.box.lo[d] <= out.shape[d] - one.box.size[d], Code::BadFormat,
                       [&] { return fmt::format("{}: chunk {} reaches past the shape {}", key, shard::to_string(one.box), shard::to_string(out.shape)); });
      one.item = take(key, &one.box);
      out.chunks.push_back(std::move(one));
    }
    out_.tensors.emplace(key, std::move(out));
  }

  void nesting(const Graph& g, Ref dict) {
    if (g.kind(dict) != Kind::Dict) return;
    constexpr std::size_t kMostSteps = 64;
    const auto entries = g.items(dict);
    std::size_t text = 0, most = 1 << 20;  // a key is its path's steps with dots between them, so that these are no longer; but many paths may share one step
    for (std::size_t i = 0; i + 1 < entries.size(); i += 2) most += 4 * g.text(entries[i]).size();
    for (std::size_t i = 0; i + 1 < entries.size(); i += 2) {
      const std::string key(g.text(entries[i]));
      if (!out_.tensors.contains(key) && !out_.bytes.contains(key)) continue;
      auto& path = out_.nesting[key];
      path.clear();  // of a key that stands twice the last, as in Python
      const auto kind = g.kind(entries[i + 1]);
      shard::require(kind == Kind::Tuple || kind == Kind::List, Code::BadFormat, [&] { return fmt::format(".metadata: planner_data of '{}' is no path", key); });
      const auto steps = g.items(entries[i + 1]);
      shard::require(steps.size() <= kMostSteps, Code::BadFormat, [&] { return fmt::format(".metadata: planner_data of '{}' has {} steps; at most {} are taken for real", key, steps.size(), kMostSteps); });
      for (const auto step : steps) {
        if (g.kind(step) == Kind::Text) text += g.text(step).size();
        shard::require(text <= most, Code::BadFormat, [&] { return fmt::format(".metadata: planner_data of '{}' and those before it are longer than {} bytes, their keys are not", key, most); });
        if (g.kind(step) == Kind::Int) path.emplace_back(g.integer(step));
        else path.emplace_back(std::string(g.text(step)));
      }
    }
  }

  void flattened(const Graph& g, Ref dict) {
    if (g.kind(dict) != Kind::Dict) return;
    const auto entries = g.items(dict);
    for (std::size_t i = 0; i + 1 < entries.size(); i += 2)
      if (const auto shape = g.kind(entries[i + 1]) == Kind::Dict ? g.find(entries[i + 1], "nd_reformulated_orig_global_shape") : std::nullopt)
        out_.flattened[std::string(g.text(entries[i]))] = need_shape(g, *shape, "original shape");
  }

  struct Stored {
    Item item;
    bool taken;  ///< by a key of state_dict_metadata
  };

  const std::filesystem::path& folder_;
  Metadata out_;
  std::unordered_map<std::string, Stored> items_;
  std::unordered_map<std::string, std::uint32_t> files_;
  std::map<std::string, std::size_t> found_, untold_;  ///< by rule
};

/// Writes the objects of one Metadata; names them once.
class Emitter {
 public:
  std::string write(const Metadata& metadata) {
    std::vector<Ref> states, storage, planner;
    const auto place = [&](const std::string& key) {
      if (const auto found = metadata.nesting.find(key); found != metadata.nesting.end()) planner.insert(planner.end(), {g_.word(key), path(found->second)});
    };
    for (const auto& [key, item] : metadata.bytes) {
      states.insert(states.end(), {g_.word(key), object("BytesStorageMetadata", std::nullopt)});
      add_storage(storage, key, nullptr, 0, metadata.files[item.file], item);
      place(key);
    }
    for (const auto& [key, tensor] : metadata.tensors) {
      states.insert(states.end(), {g_.word(key), tensor_state(tensor)});
      for (std::size_t i = 0; i < tensor.chunks.size(); ++i)
        add_storage(storage, key, &tensor.chunks[i].box.lo, i, metadata.files[tensor.chunks[i].item.file], tensor.chunks[i].item);
      place(key);
    }
    const auto state = g_.dict({g_.word("state_dict_metadata"), g_.dict(states), g_.word("planner_data"),
                                planner.empty() ? g_.none() : g_.dict(planner), g_.word("storage_data"), g_.dict(storage),
                                g_.word("storage_meta"), g_.none(), g_.word("version"), g_.text("1.0.0")});
    return pickle::write(g_, object("Metadata", state), 4);
  }

 private:
  Ref object(std::string_view name, std::optional<Ref> state, const char* module = kMetadata) {
    const auto out = g_.object(g_.symbol(module, name), g_.empty_tuple(), true);
    if (state) g_.set_state(out, *state);
    return out;
  }
  Ref path(const Path& steps) {
    std::vector<Ref> out;
    for (const auto& step : steps)
      if (const auto* text = std::get_if<std::string>(&step)) out.push_back(g_.word(*text));
      else out.push_back(g_.integer(std::get<std::int64_t>(step)));
    return g_.tuple(out);
  }
  Ref size(const shard::Shape& shape) {
    const auto [at, fresh] = sizes_.try_emplace(shape, 0);
    if (fresh) at->second = size_node(g_, shape);
    return at->second;
  }
  Ref properties(shard::DType dtype) {
    const auto [at, fresh] = properties_.try_emplace(dtype, 0);
    if (!fresh) return at->second;
    const auto layout = g_.object(g_.symbol("torch.serialization", "_get_layout"), g_.tuple({g_.text("torch.strided")}), false);
    const auto format = g_.object(g_.symbol(kMetadata, "_MEM_FORMAT_ENCODING"), g_.tuple({g_.integer(0)}), false);
    // Five values: torch up to 2.11 refuses a sixth.
    return at->second = object("TensorProperties", g_.tuple({dtype_node(g_, dtype), layout, g_.boolean(false), format, g_.boolean(false)}));
  }
  Ref tensor_state(const Tensor& tensor) {
    std::vector<Ref> chunks;
    for (const auto& chunk : tensor.chunks)
      chunks.push_back(object("ChunkStorageMetadata", g_.dict({g_.word("offsets"), size(chunk.box.lo), g_.word("sizes"), size(chunk.box.size)})));
    return object("TensorStorageMetadata", g_.dict({g_.word("properties"), properties(tensor.dtype), g_.word("size"), size(tensor.shape),
                                                    g_.word("chunks"), g_.list(chunks)}));
  }
  void add_storage(std::vector<Ref>& storage, const std::string& key, const shard::Shape* lo, std::size_t index,
                   const std::string& file, const Item& item) {
    const auto at = g_.dict({g_.word("fqn"), g_.word(key), g_.word("offset"), lo ? size(*lo) : g_.none(), g_.word("index"),
                             lo ? g_.integer(static_cast<std::int64_t>(index)) : g_.none()});
    const auto info = g_.dict({g_.word("relative_path"), g_.word(file), g_.word("offset"),
                               g_.integer(static_cast<std::int64_t>(item.offset)), g_.word("length"),
                               g_.integer(static_cast<std::int64_t>(item.length))});
    storage.insert(storage.end(), {object("MetadataIndex", at), object("_StorageInfo", info, "torch.distributed.checkpoint.filesystem")});
  }

  Graph g_;
  std::map<shard::Shape, Ref> sizes_;
  std::map<shard::DType, Ref> properties_;
};

/// What every rank wrote for itself (use_collectives=False), together: their chunks side by side, equal ones as replicas.
void merge(Metadata& out, std::unordered_set<std::string>& files, Metadata&& more, const std::string& name) {
  const auto first = static_cast<std::uint32_t>(out.files.size());
  for (const auto& file : more.files)
    shard::require(files.insert(file).second, Code::BadFormat,
                   [&] { return fmt::format("{}: names {}, as another rank's does; each rank writes its own files", name, file); });
  out.files.insert(out.files.end(), more.files.begin(), more.files.end());
  for (auto& [key, tensor] : more.tensors) {
    for (auto& chunk : tensor.chunks) chunk.item.file += first;
    const auto [at, fresh] = out.tensors.try_emplace(key, tensor);
    shard::require(!out.bytes.contains(key), Code::Mismatch, [&] { return fmt::format("{}: a tensor in {}; another rank's holds no tensor", key, name); });
    if (fresh) continue;
    auto& into = at->second;
    shard::require(into.dtype == tensor.dtype && into.shape == tensor.shape, Code::Mismatch, [&] {
      return fmt::format("{}: {} {} in {}; another rank's is {} {}", key, shard::name(tensor.dtype), shard::to_string(tensor.shape), name, shard::name(into.dtype), shard::to_string(into.shape));
    });
    into.chunks.insert(into.chunks.end(), tensor.chunks.begin(), tensor.chunks.end());
  }
  for (auto& [key, item] : more.bytes) {
    item.file += first;
    shard::require(!out.tensors.contains(key), Code::Mismatch, [&] { return fmt::format("{}: no tensor in {}; another rank's holds one", key, name); });
    if (!out.bytes.try_emplace(key, item).second) out.copies.push_back({key, item});
  }
  const auto join = [&](auto& into, auto& from, const char* what) {
    for (const auto& [key, value] : from)
      shard::require(into.try_emplace(key, value).first->second == value, Code::Mismatch, [&] { return fmt::format("{}: {} of '{}' is another than in an earlier rank's", name, what, key); });
  };
  join(out.nesting, more.nesting, "planner_data");
  join(out.flattened, more.flattened, "mcore_data");
  out.findings.insert(out.findings.end(), more.findings.begin(), more.findings.end());
}

Metadata read_one(const std::filesystem::path& folder, const std::string& name) {
  const auto text = read_text(inside(folder, name), kMostBytes);
  try {
    const auto graph = pickle::parse(std::as_bytes(std::span(text.data(), text.size())));
    return Parser(folder).parse(graph);
  } catch (const shard::Error& error) {
    throw error.within((folder / name).string());
  }
}

std::string rank_name(std::size_t rank) { return fmt::format("__{}.metadata", rank); }

/// Numbers of the ranks that wrote a `.metadata` each.
std::size_t count_ranks(const std::filesystem::path& folder) {
  std::set<std::size_t> ranks;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    const auto name = entry.path().filename().string();
    std::size_t rank = 0;
    if (name.starts_with("__") && std::from_chars(name.data() + 2, name.data() + name.size(), rank).ec == std::errc() && name == rank_name(rank)) ranks.insert(rank);
  }
  for (std::size_t rank = 0; rank < ranks.size(); ++rank)
    shard::require(ranks.contains(rank), Code::BadFormat,
                   [&] { return fmt::format("{}: holds {} but no {}: an unfinished save", folder.string(), rank_name(*ranks.rbegin()), rank_name(rank)); });
  return ranks.size();
}

}  // namespace

bool has_metadata(const std::filesystem::path& folder) { return std::filesystem::exists(folder / ".metadata") || std::filesystem::exists(folder / rank_name(0)); }

Metadata read_metadata(const std::filesystem::path& folder) {
  if (std::filesystem::exists(folder / ".metadata")) return read_one(folder, ".metadata");
  const auto ranks = count_ranks(folder);
  shard::require(ranks > 0, Code::NotFound, [&] { return fmt::format("{}: holds no .metadata: an unfinished save", folder.string()); });
  auto out = read_one(folder, rank_name(0));
  std::unordered_set<std::string> files(out.files.begin(), out.files.end());
  for (std::size_t rank = 1; rank < ranks; ++rank) merge(out, files, read_one(folder, rank_name(rank)), rank_name(rank));
  return out;
}

std::string write_metadata(const Metadata& metadata) { return Emitter().write(metadata); }

}  // namespace formats::torch_dcp
