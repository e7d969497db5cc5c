// What a torch.save file that we write says about its tensors, and where its records go.
#include "formats/torch_save.h"
#include "formats/torch_storage.h"
#include "libshard/error.h"
#include "libshard/fnv1a.h"

namespace formats {
namespace {

using pickle::Graph;
using pickle::Ref;
using shard::DType;

Ref integers(Graph& graph, const shard::Shape& values) {
  std::vector<Ref> items;
  items.reserve(values.size());
  for (const shard::Index value : values) items.push_back(graph.integer(value));
  return graph.tuple(items);
}

Ref storage_node(Graph& graph, DType dtype, std::string_view key, std::int64_t elements) {
  const std::string_view typed = storage_class(dtype);
  const Ref type =
      typed.empty() ? graph.symbol("torch.storage", "UntypedStorage") : graph.symbol("torch", typed);
  const std::int64_t unit = typed.empty() ? static_cast<std::int64_t>(size_of(dtype)) : 1;
  return graph.persistent(graph.tuple(
      {graph.word("storage"), type, graph.text(key), graph.word("cpu"), graph.integer(elements * unit)}));
}

/// 40 digits, the same for the same pickle and storage sizes; torch's own says no more.
std::string serialization_id(std::string_view pickle_bytes, std::span<const std::uint64_t> sizes) {
  std::string listed;
  for (const std::uint64_t size : sizes) listed += std::to_string(size) + ",";
  const auto hash = shard::fnv1a(std::as_bytes(std::span(listed)));
  return fmt::format("{:020}{:020}", hash, shard::fnv1a(std::as_bytes(std::span(pickle_bytes)), hash));
}

}  // namespace

Ref dtype_node(Graph& graph, DType dtype) { return graph.symbol("torch", torch_name(dtype)); }

Ref size_node(Graph& graph, const shard::Shape& sizes) {
  return graph.object(graph.symbol("torch", "Size"), graph.tuple({integers(graph, sizes)}), false);
}

Ref tensor_node(Graph& graph, DType dtype, std::string_view storage_key, const shard::Shape& sizes,
                std::int64_t offset, std::optional<std::int64_t> storage_elements) {
  const bool typed = !storage_class(dtype).empty();
  const std::int64_t elements = storage_elements.value_or(offset + shard::volume(sizes));
  const Ref hooks = graph.object(graph.symbol("collections", "OrderedDict"), graph.empty_tuple(), false);
  std::vector<Ref> args = {
      storage_node(graph, dtype, storage_key, elements), graph.integer(offset), integers(graph, sizes),
      integers(graph, shard::row_major(sizes)),          graph.boolean(false),  hooks};
  if (!typed) args.push_back(dtype_node(graph, dtype));
  const Ref rebuild = graph.symbol("torch._utils", typed ? "_rebuild_tensor_v2" : "_rebuild_tensor_v3");
  return graph.object(rebuild, graph.tuple(args), false);
}

TorchLayout torch_layout(std::string root, std::string_view pickle_bytes,
                         std::span<const std::uint64_t> storage_sizes) {
  std::vector<std::pair<std::string, std::uint64_t>> entries;
  std::vector<SmallRecord> small;
  const auto add = [&](std::string name, std::string bytes) {
    entries.emplace_back(std::move(name), bytes.size());
    small.push_back({entries.size() - 1, std::move(bytes)});
  };
  add("data.pkl", std::string(pickle_bytes));
  add(".format_version", "1");
  add(".storage_alignment", "64");
  add("byteorder", "little");
  const std::size_t first_storage = entries.size();
  for (std::size_t i = 0; i < storage_sizes.size(); ++i) {
    entries.emplace_back(fmt::format("data/{}", i), storage_sizes[i]);
  }
  add("version", "3\n");
  add(".data/serialization_id", serialization_id(pickle_bytes, storage_sizes));
  return {ZipLayout(std::move(root), std::move(entries)), std::move(small), first_storage};
}

}  // namespace formats
