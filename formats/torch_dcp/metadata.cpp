// The Metadata object of torch.distributed.checkpoint as plain data.
#include "formats/torch_dcp/metadata.h"

#include "formats/torch_save.h"
#include "libshard/error.h"

#include <unordered_map>

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
      const auto [at, fresh] = items_.emplace(index_key(fqn, lo ? &*lo : nullptr), item(g, info));
      shard::require(fresh, Code::BadFormat,
                     [&] { return fmt::format("{}: two items for one chunk{}", fqn, lo ? " at " + shard::to_string(*lo) : ""); });
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

  Item take(const std::string& key, const shard::Shape* offset) {
    const auto found = items_.find(index_key(key, offset));
    shard::require(found != items_.end(), Code::BadFormat, [&] {
      return fmt::format("{}: no stored item for its chunk{}", key, offset ? " at " + shard::to_string(*offset) : "");
    });
    return found->second;
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
      const auto named = g.items(*state)[0];
      return fmt::format("{}: its dtype {} is not supported", key, g.kind(named) == Kind::Symbol ? g.name(named) : "without a name");
    });
    out.dtype = *dtype;
    for (const auto chunk : g.items(need(g, value, "chunks"))) {
      Chunk one{{need_shape(g, need(g, chunk, "offsets"), key), need_shape(g, need(g, chunk, "sizes"), key)}, {}};
      shard::require(one.box.lo.size() == out.shape.size() && one.box.size.size() == out.shape.size(), Code::BadFormat,
                     [&] { return fmt::format("{}: a chunk has another number of dimensions than {}", key, shard::to_string(out.shape)); });
      for (std::size_t d = 0; d < out.shape.size(); ++d)
        shard::require(one.box.size[d] <= out.shape[d] && one.box.lo[d] <= out.shape[d] - one.box.size[d], Code::BadFormat,
                       [&] { return fmt::format("{}: chunk {} reaches past the shape {}", key, shard::to_string(one.box), shard::to_string(out.shape)); });
      one.item = take(key, &one.box.lo);
      out.chunks.push_back(std::move(one));
    }
    out_.tensors.emplace(key, std::move(out));
  }

  void flattened(const Graph& g, Ref dict) {
    if (g.kind(dict) != Kind::Dict) return;
    const auto entries = g.items(dict);
    for (std::size_t i = 0; i + 1 < entries.size(); i += 2)
      if (const auto shape = g.kind(entries[i + 1]) == Kind::Dict ? g.find(entries[i + 1], "nd_reformulated_orig_global_shape") : std::nullopt)
        out_.flattened[std::string(g.text(entries[i]))] = need_shape(g, *shape, "original shape");
  }

  const std::filesystem::path& folder_;
  Metadata out_;
  std::unordered_map<std::string, Item> items_;
  std::unordered_map<std::string, std::uint32_t> files_;
};

/// Writes the objects of one Metadata; names them once.
class Emitter {
 public:
  std::string write(const Metadata& metadata, bool nested) {
    std::vector<Ref> states, storage, planner;
    for (const auto& [key, item] : metadata.bytes) {
      states.insert(states.end(), {g_.word(key), object("BytesStorageMetadata", std::nullopt)});
      add_storage(storage, key, nullptr, 0, metadata.files[item.file], item);
      planner.insert(planner.end(), {g_.word(key), path_of(key)});
    }
    for (const auto& [key, tensor] : metadata.tensors) {
      states.insert(states.end(), {g_.word(key), tensor_state(tensor)});
      for (std::size_t i = 0; i < tensor.chunks.size(); ++i)
        add_storage(storage, key, &tensor.chunks[i].box.lo, i, metadata.files[tensor.chunks[i].item.file], tensor.chunks[i].item);
      planner.insert(planner.end(), {g_.word(key), path_of(key)});
    }
    const auto state = g_.dict({g_.word("state_dict_metadata"), g_.dict(states), g_.word("planner_data"),
                                nested ? g_.dict(planner) : g_.none(), g_.word("storage_data"), g_.dict(storage),
                                g_.word("storage_meta"), g_.none(), g_.word("version"), g_.text("1.0.0")});
    return pickle::write(g_, object("Metadata", state), 4);
  }

 private:
  Ref object(std::string_view name, std::optional<Ref> state, const char* module = kMetadata) {
    const auto out = g_.object(g_.symbol(module, name), g_.empty_tuple(), true);
    if (state) g_.set_state(out, *state);
    return out;
  }
  Ref path_of(const std::string& key) {
    const auto dot = key.find('.');
    if (dot == key.npos) return g_.tuple({g_.word(key)});
    return g_.tuple({g_.word(key.substr(0, dot)), g_.word(key.substr(dot + 1))});
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

}  // namespace

Metadata read_metadata(const std::filesystem::path& folder) {
  const auto text = read_text(inside(folder, ".metadata"), kMostBytes);
  try {
    const auto graph = pickle::parse(std::as_bytes(std::span(text.data(), text.size())));
    return Parser(folder).parse(graph);
  } catch (const shard::Error& error) {
    throw error.within((folder / ".metadata").string());
  }
}

std::string write_metadata(const Metadata& metadata, bool nested) { return Emitter().write(metadata, nested); }

}  // namespace formats::torch_dcp
