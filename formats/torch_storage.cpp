// Which storage a persistent id of torch.save names. Refuses classes that are not known and sizes beyond 2^62
// bytes.
#include "formats/torch_storage.h"

#include "libshard/error.h"

namespace formats {
namespace {

using pickle::Graph;
using pickle::Kind;
using pickle::Ref;
using shard::Code;
using shard::DType;

struct Class {
  std::string_view name;
  std::optional<DType> dtype;
  std::uint64_t bytes;  // of one element
  bool quantised = false;
};
constexpr Class kClasses[] = {
    {"FloatStorage", DType::F32, 4},
    {"DoubleStorage", DType::F64, 8},
    {"HalfStorage", DType::F16, 2},
    {"BFloat16Storage", DType::BF16, 2},
    {"LongStorage", DType::I64, 8},
    {"IntStorage", DType::I32, 4},
    {"ShortStorage", DType::I16, 2},
    {"CharStorage", DType::I8, 1},
    {"ByteStorage", DType::U8, 1},
    {"BoolStorage", DType::Bool, 1},
    {"ComplexFloatStorage", DType::C64, 8},
    {"ComplexDoubleStorage", DType::C128, 16},
    {"UntypedStorage", std::nullopt, 1},
    {"_UntypedStorage", std::nullopt, 1},
    {"QInt8Storage", std::nullopt, 1, true},
    {"QUInt8Storage", std::nullopt, 1, true},
    {"QInt32Storage", std::nullopt, 4, true},
    {"QUInt4x2Storage", std::nullopt, 1, true},
    {"QUInt2x4Storage", std::nullopt, 1, true},
};

const Class& class_of(const Graph& graph, Ref symbol) {
  shard::require(graph.kind(symbol) == Kind::Symbol, Code::BadFormat,
                 [] { return "storage: its class is no name"; });
  const auto module = graph.module(symbol), name = graph.name(symbol);
  const bool torch = module == "torch" || module == "torch.cuda" || module == "torch.storage";
  for (const Class& known : kClasses) {
    if (torch && known.name == name) return known;
  }
  shard::fail(Code::BadFormat, "storage: its class {}.{} is not known", module, name);
}

std::uint64_t bytes_of(const Graph& graph, Ref elements, std::uint64_t element_bytes, std::string_view what) {
  const std::int64_t count = graph.integer(elements);
  std::uint64_t bytes = 0;
  const bool fits =
      count >= 0 && !__builtin_mul_overflow(static_cast<std::uint64_t>(count), element_bytes, &bytes);
  shard::require(fits && bytes < std::uint64_t{1} << 62, Code::BadFormat,
                 [&] { return fmt::format("storage: {} of {} elements", what, count); });
  return bytes;
}

/// (key of the view, offset, elements), in elements.
void apply_view(const Graph& graph, Ref view, StorageId& id) {
  if (graph.is_none(view)) return;
  const auto parts = graph.items(view);
  shard::require(parts.size() == 3, Code::BadFormat, [] { return "storage: a view that is no triple"; });
  id.view_begin = bytes_of(graph, parts[1], id.element_bytes, "a view's offset");
  id.view_bytes = bytes_of(graph, parts[2], id.element_bytes, "a view");
  shard::require(id.view_begin <= id.bytes && id.view_bytes <= id.bytes - id.view_begin, Code::BadFormat,
                 [&] {
                   return fmt::format("storage '{}': a view of bytes {}+{} in {}", id.key, id.view_begin,
                                      id.view_bytes, id.bytes);
                 });
}

}  // namespace

std::optional<StorageId> storage_of(const Graph& graph, Ref ref) {
  if (graph.kind(ref) != Kind::Persistent) return std::nullopt;
  const Ref id = graph.items(ref)[0];
  if (graph.kind(id) != Kind::Tuple) return std::nullopt;
  const auto parts = graph.items(id);
  if (parts.size() < 5 || parts.size() > 6 || !graph.is_text(parts[0], "storage")) return std::nullopt;
  const Class& found = class_of(graph, parts[1]);
  const std::uint64_t bytes = bytes_of(graph, parts[4], found.bytes, "a storage");
  StorageId storage{graph.text(parts[2]), found.dtype, found.quantised, found.bytes, bytes, 0, bytes};
  if (parts.size() == 6) apply_view(graph, parts[5], storage);
  return storage;
}

std::string_view storage_class(DType dtype) {
  for (const Class& known : kClasses) {
    if (known.dtype == dtype) return known.name;
  }
  return "";
}

}  // namespace formats
