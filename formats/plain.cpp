// Reading one torch file, and writing same-key targets.
#include "formats/plain.h"

#include "formats/hf/hf.h"
#include "formats/json.h"
#include "formats/safetensors/header.h"
#include "formats/torch_dcp/metadata.h"
#include "formats/torch_dcp/reader.h"
#include "formats/torch_save.h"
#include "libshard/error.h"

#include <algorithm>

namespace formats {
namespace {

using shard::Code;
using shard::Index;

constexpr std::uint64_t kFileBytes = 5ull << 30;  // where a new .distcp file begins
constexpr std::uint64_t kBlock = 1 << 20;         // of what is copied as it is

/// A tensor or object found in a pickled value, by its path ("model.layers.0.weight").
class Walk {
 public:
  Walk(Checkpoint& out, const TorchFile& archive) : out_(out), archive_(archive) {}

  void visit(pickle::Ref root) {
    struct Frame {
      std::string path;
      pickle::Ref ref;
      int depth;
    };
    std::vector<Frame> stack{{"", root, 0}};
    std::vector<bool> seen(archive_.graph.size());
    const auto& g = archive_.graph;
    while (!stack.empty()) {
      const auto [path, ref, depth] = stack.back();
      stack.pop_back();
      if (const auto tensor = tensor_at(path, ref)) {
        add(path, *tensor);
        continue;
      }
      const auto kind = g.kind(ref);
      const bool dict = kind == pickle::Kind::Dict || (kind == pickle::Kind::Object && g.dict_items(ref));
      const bool list = kind == pickle::Kind::List || kind == pickle::Kind::Tuple;
      if (!dict && !list) {
        if (kind == pickle::Kind::Object || kind == pickle::Kind::Bytes) out_.stored.objects.push_back({path, "object", 0, 0, 0});
        continue;
      }
      if (seen[ref] || depth > 64) continue;  // a graph, not a tree: each container once
      seen[ref] = true;
      const auto items = g.items(ref);
      for (std::size_t i = 0; i < items.size(); i += dict ? 2 : 1) {
        if (dict && i + 1 >= items.size()) break;
        auto name = !dict ? std::to_string(i) : g.kind(items[i]) == pickle::Kind::Text ? std::string(g.text(items[i])) : fmt::format("#{}", i / 2);
        stack.push_back({path.empty() ? std::move(name) : path + "." + name, dict ? items[i + 1] : items[i], depth + 1});
      }
    }
  }

 private:
  std::optional<StoredTensor> tensor_at(const std::string& path, pickle::Ref ref) const try {
    return tensor_of(archive_.graph, ref);
  } catch (const shard::Error& error) {
    throw error.within(fmt::format("'{}'", path));
  }

  void add(std::string path, const StoredTensor& tensor) {
    if (path.empty()) path = "tensor";
    const auto* record = archive_.zip.find("data/" + tensor.storage);
    shard::require(record != nullptr, Code::BadFormat, [&] { return fmt::format("'{}': storage {} is missing", path, tensor.storage); });
    const auto [at, fresh] = streams_.try_emplace(tensor.storage, static_cast<std::uint32_t>(out_.stored.streams.size()));
    if (fresh) {
      out_.stored.streams.push_back({0, record->offset, record->size, std::nullopt, false});
      if (archive_.zip.crcs_recorded) out_.stored.streams.back().crc32 = record->crc32;
    }
    auto stride = tensor.strides;
    for (auto& step : stride) step *= static_cast<Index>(size_of(tensor.dtype));
    const auto [place, alone] = out_.stored.tensors.try_emplace(path);
    shard::require(alone, Code::BadFormat, [&] { return fmt::format("'{}': two tensors are named so, one of them inside a container", path); });
    place->second = {path, tensor.dtype, tensor.sizes, tensor.sizes, {{shard::whole(tensor.sizes), {at->second, tensor.offset, stride}, {}}}, false};
  }

  Checkpoint& out_;
  const TorchFile& archive_;
  std::map<std::string, std::uint32_t> streams_;
};

void describe(Target& target, const PlainTensor& one, std::uint32_t stream, std::uint64_t offset) {
  auto stride = shard::row_major(one.shape);
  for (auto& step : stride) step *= static_cast<Index>(size_of(one.dtype));
  target.writer->described().tensors[one.key] = {one.key, one.dtype, one.shape, one.shape, {{shard::whole(one.shape), {stream, offset, std::move(stride)}, {}}}, false};
}

/// Without a state dict that was saved: "model.embed.weight" is 'embed.weight' of 'model'.
torch_dcp::Path first_step(const std::string& key) {
  const auto dot = key.find('.');
  if (dot == key.npos) return {key};
  return {key.substr(0, dot), key.substr(dot + 1)};
}

}  // namespace

std::vector<PlainTensor> same_keys(const Checkpoint& source, const TargetOptions& options) {
  shard::require(!source.megatron, Code::BadFormat, [&] { return fmt::format("--to {}: a {} checkpoint's keys are not its own there; convert it to hf first", options.format, source.format); });
  const bool one = (options.parallel.tp == 1 || options.format == "hdf5") && options.parallel.pp == 1 && options.parallel.ep == 1;
  shard::require(one, Code::BadLayout, [&] { return fmt::format("layout: {} is not cut among ranks", options.format); });
  const auto repeated = hf::repeated_heads(source);
  std::vector<PlainTensor> out;
  for (const auto& [key, tensor] : (source.hf ? source.stored : source.logical).tensors) {
    if (repeated.contains(key)) continue;
    const bool wide = source.hf && key.ends_with("e_score_correction_bias");  // F32 by rule
    out.push_back({key, wide ? shard::DType::F32 : options.dtype && is_floating(tensor.dtype) ? *options.dtype : tensor.dtype, tensor.natural});
  }
  return out;
}

void join(const Checkpoint& source, Target& target) {
  target.writer->described().files = target.writer->folder().names();
  target.logical = target.writer->described();
  if (!source.hf) return;
  std::vector<shard::Finding> findings;
  target.logical = hf::logical_of(source, target.writer->described(), findings);
  refuse(findings);
}

namespace {

/// Objects that the target cannot hold are named.
void drop_objects(const Checkpoint& source, Target& target, const char* why) {
  for (const auto& object : source.stored.objects) target.dropped.push_back({object.key, why});
}

}  // namespace

Checkpoint open_torch_file(const std::filesystem::path& path, const OpenOptions&) {
  Checkpoint out;
  out.format = "pt";
  out.folder = path.parent_path();
  out.files = std::make_shared<FilePool>(std::vector{path});
  out.stored.files = {path.filename().string()};
  const auto file = out.files->get(0);
  try {
    const auto archive = open_torch(*file);
    Walk(out, archive).visit(archive.graph.root);
  } catch (const shard::Error& error) {
    throw error.within(path.string());
  }
  out.logical = out.stored;
  return out;
}

void drop_tensors(Checkpoint& checkpoint, const OpenOptions& options) {
  std::erase_if(checkpoint.logical.tensors, [&](const auto& entry) {
    const bool drop = std::any_of(options.drop.begin(), options.drop.end(), [&](const auto& pattern) { return glob(pattern, entry.first); });
    if (drop) checkpoint.not_carried.push_back({entry.first, "--drop"});
    return drop;
  });
}

void create_dcp(const std::filesystem::path& path, const Checkpoint& source, const TargetOptions& options, Target& target) {
  const auto all = same_keys(source, options);
  target.writer = make_writer(path, options);
  auto& writer = *target.writer;
  torch_dcp::Metadata metadata;
  std::uint32_t file = 0;
  std::uint64_t at = kFileBytes;
  const auto make_room = [&](std::uint64_t bytes) {
    if (!metadata.files.empty() && at + bytes <= kFileBytes) return;
    if (!metadata.files.empty()) writer.folder().resize(file, at);
    metadata.files.push_back(fmt::format("__0_{}.distcp", metadata.files.size()));
    file = writer.folder().add(metadata.files.back());
    at = 0;
  };
  const auto in_metadata = [&] { return static_cast<std::uint32_t>(metadata.files.size() - 1); };
  for (const auto& one : all) {
    make_room(one.bytes());
    pickle::Graph g;
    const auto root = tensor_node(g, one.dtype, "0", one.shape);
    const auto bytes = one.bytes();
    const auto added = writer.add_archive(file, at, "archive", pickle::write(g, root, 2), std::span(&bytes, 1));
    metadata.tensors[one.key] = {one.dtype, one.shape, {{shard::whole(one.shape), {in_metadata(), at, added.size, false}}}};
    describe(target, one, added.first_stream, 0);
    at += added.size;
  }
  for (const auto& object : source.stored.objects) {  // bytes items of a plain checkpoint travel as they are
    if (source.format != "dcp") {
      target.dropped.push_back({object.key, "not a tensor"});
      continue;
    }
    if (const auto damaged = torch_dcp::check_object(source, object)) shard::refuse({*damaged});
    make_room(object.bytes);
    const auto from = source.files->get(object.file);
    std::vector<std::byte> block(std::min(object.bytes, kBlock));
    for (std::uint64_t done = 0; done < object.bytes; done += block.size()) {
      const auto part = std::span(block).first(std::min<std::uint64_t>(block.size(), object.bytes - done));
      from->read(object.offset + done, part);
      writer.folder().write(file, at + done, part);
    }
    metadata.bytes[object.key] = {in_metadata(), at, object.bytes, false};
    target.carried.push_back(object.key);
    at += object.bytes;
  }
  if (!metadata.files.empty()) writer.folder().resize(file, at);
  if (source.format == "dcp") metadata.nesting = source.nesting;  // none where the state dict was saved as it was
  else
    for (const auto& one : all) metadata.nesting[one.key] = first_step(one.key);
  writer.folder().write(writer.folder().add(".metadata"), 0, torch_dcp::write_metadata(metadata));
  hf::carry_files(source, target, "", options.dtype);
  join(source, target);
}

void write_safetensors(Target& target, const std::vector<PlainTensor>& tensors, std::uint64_t max_shard_size, std::map<std::string, std::string> metadata,
                       const std::string& stem) {
  auto& writer = *target.writer;
  std::vector<std::vector<const PlainTensor*>> shards(1);
  std::uint64_t filled = 0, total = 0;
  for (const auto& one : tensors) {
    shard::require(!safetensors_name(one.dtype).empty(), Code::BadFormat, [&] { return fmt::format("{}: {} has no place in safetensors", one.key, shard::name(one.dtype)); });
    const auto bytes = one.bytes();
    if (!shards.back().empty() && filled + bytes > max_shard_size) shards.emplace_back(), filled = 0;
    shards.back().push_back(&one);
    filled += bytes;
    total += bytes;
  }
  metadata.erase("DCP_SHARDING_INFO");
  metadata.erase("DCP_VERSION");
  metadata["format"] = "pt";
  std::map<std::string, std::string> weight_map;
  for (std::size_t i = 0; i < shards.size(); ++i) {
    const auto name = shards.size() == 1 ? stem + ".safetensors" : fmt::format("{}-{:05d}-of-{:05d}.safetensors", stem, i + 1, shards.size());
    const auto file = writer.folder().add(name);
    std::vector<safetensors::Entry> entries;
    std::uint64_t at = 0;
    for (const auto* one : shards[i]) {
      entries.push_back({one->key, one->dtype, one->shape, at, at + one->bytes()});
      at += one->bytes();
      weight_map[one->key] = name;
    }
    const auto header = safetensors::write_header(entries, metadata);
    writer.folder().write(file, 0, header);
    writer.folder().resize(file, header.size() + at);
    const auto stream = writer.add_stream(file, header.size(), at, false);
    for (std::size_t k = 0; k < entries.size(); ++k) describe(target, *shards[i][k], stream, entries[k].begin);
  }
  if (shards.size() > 1) {
    const nlohmann::ordered_json index{{"metadata", {{"total_size", total}}}, {"weight_map", weight_map}};
    writer.folder().write(writer.folder().add(stem + ".safetensors.index.json"), 0, index.dump(2) + "\n");
  }
}

void create_safetensors(const std::filesystem::path& path, const Checkpoint& source, const TargetOptions& options, Target& target) {
  target.writer = make_writer(path, options);
  write_safetensors(target, same_keys(source, options), options.max_shard_size, source.metadata);
  drop_objects(source, target, "safetensors hold only tensors");
  hf::carry_files(source, target, "", options.dtype);
  join(source, target);
}

}  // namespace formats
