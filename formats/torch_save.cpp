// What a torch pickle says about tensors: which storage, dtype, offset, sizes and strides. Refuses a tensor
// that does not lie within its storage, and every kind that is not plain memory.
#include "formats/torch_save.h"

#include <algorithm>

#include "formats/torch_storage.h"
#include "libshard/error.h"

namespace formats {
namespace {

using pickle::Graph;
using pickle::Kind;
using pickle::Ref;
using shard::Code;
using shard::DType;
using shard::Index;

constexpr Index kMostRepeated = 64 << 20;  // bytes that a view of fewer may stand for
constexpr int kWrappers = 8;  // a Parameter with attributes has two

template <typename... Args>
[[noreturn]] void refuse(fmt::format_string<Args...> format, Args&&... args) {
  throw shard::Error(Code::BadFormat, "tensor: " + fmt::format(format, std::forward<Args>(args)...));
}

/// A call that makes a tensor.
struct Call {
  std::string_view function;
  std::span<const Ref> args;
};

bool is_rebuild(const Graph& graph, Ref symbol) {
  if (graph.kind(symbol) != Kind::Symbol || !graph.name(symbol).starts_with("_rebuild_")) return false;
  return graph.module(symbol) == "torch._utils" || graph.module(symbol) == "torch._tensor";
}

std::optional<Call> call_of(const Graph& graph, Ref ref) {
  if (graph.kind(ref) != Kind::Object || !is_rebuild(graph, graph.callable(ref))) return std::nullopt;
  return Call{graph.name(graph.callable(ref)), graph.items(graph.args(ref))};
}

void need(const Call& call, std::size_t least) {
  if (call.args.size() < least)
    refuse("{} has {} arguments; {} are needed", call.function, call.args.size(), least);
}

/// The call inside _rebuild_from_type_v2(function, type, arguments, state).
Call call_from_type(const Graph& graph, const Call& call) {
  need(call, 3);
  const Ref function = call.args[0], type = call.args[1];
  if (!graph.is_symbol(type, "torch", "Tensor") &&
      !graph.is_symbol(type, "torch.nn.parameter", "Parameter")) {
    const bool named = graph.kind(type) == Kind::Symbol;
    refuse("{}: the subclass {} is not supported", call.function,
           named ? graph.name(type) : "without a name");
  }
  if (!is_rebuild(graph, function) || graph.kind(call.args[2]) != Kind::Tuple) {
    refuse("{}: of no known function", call.function);
  }
  return {graph.name(function), graph.items(call.args[2])};
}

/// The innermost call, of the function that takes a storage.
Call unwrapped(const Graph& graph, Call call) {
  for (int depth = 0; depth < kWrappers; ++depth) {
    if (call.function == "_rebuild_from_type_v2") {
      call = call_from_type(graph, call);
    } else if (call.function == "_rebuild_parameter" || call.function == "_rebuild_parameter_with_state") {
      need(call, 1);
      const auto inner = call_of(graph, call.args[0]);
      if (!inner) refuse("{}: of no tensor", call.function);
      call = *inner;
    } else {
      return call;
    }
  }
  refuse("wrapped more than {} times", kWrappers);
}

void check_flags(const Graph& graph, const Call& call, std::size_t at) {
  if (call.args.size() <= at || graph.is_none(call.args[at])) return;
  for (const std::string_view flag : {"conj", "neg"}) {
    const auto value = graph.find(call.args[at], flag);
    if (value && graph.boolean(*value)) refuse("a lazily transformed one ('{}') is not supported", flag);
  }
}

DType dtype_for(const Graph& graph, const Call& call, const StorageId& storage) {
  if (storage.quantised) refuse("{}: of a quantised storage is not supported", call.function);
  if (call.function == "_rebuild_tensor_v3") {
    need(call, 7);
    const auto dtype = dtype_of(graph, call.args[6]);
    const bool named = graph.kind(call.args[6]) == Kind::Symbol;
    if (!dtype) refuse("dtype {} is not supported", named ? graph.name(call.args[6]) : "without a name");
    return *dtype;
  }
  if (!storage.dtype) refuse("{}: of an untyped storage has no dtype", call.function);
  return *storage.dtype;
}

shard::Shape shape_argument(const Graph& graph, const Call& call, std::size_t at, std::string_view what) {
  auto shape = shape_of(graph, call.args[at]);
  if (!shape) refuse("{}: its {} are no integers", call.function, what);
  if (std::any_of(shape->begin(), shape->end(), [](Index i) { return i < 0; })) {
    refuse("{}: negative {}", call.function, what);
  }
  return std::move(*shape);
}

/// Elements from the first to the last one, inclusive; nullopt beyond an Index.
std::optional<Index> reach(const shard::Shape& sizes, const shard::Shape& strides) {
  Index last = 1;
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    Index step = 0;
    if (sizes[i] == 0) return 0;
    if (__builtin_mul_overflow(sizes[i] - 1, strides[i], &step)) return std::nullopt;
    if (__builtin_add_overflow(last, step, &last)) return std::nullopt;
  }
  return last;
}

void check_bounds(const StoredTensor& tensor, Index offset, std::uint64_t view_bytes) {
  const auto element = static_cast<Index>(size_of(tensor.dtype));
  const auto elements = std::any_of(tensor.sizes.begin(), tensor.sizes.end(), [](Index i) { return i == 0; })
                            ? std::optional<Index>(0)
                            : reach(tensor.sizes, tensor.strides);
  Index end = 0;
  const bool fits = elements && !__builtin_add_overflow(offset, *elements, &end) &&
                    !__builtin_mul_overflow(end, element, &end);
  // An empty tensor may point anywhere.
  if (fits && (*elements == 0 || static_cast<std::uint64_t>(end) <= view_bytes)) return;
  refuse("sizes {} with strides {} at element {} of {} bytes each do not fit the {} bytes of storage '{}'",
         shard::to_string(tensor.sizes), shard::to_string(tensor.strides), offset, element, view_bytes,
         tensor.storage);
}

StoredTensor plain_tensor(const Graph& graph, const Call& call) {
  const bool v2 = call.function == "_rebuild_tensor_v2", v3 = call.function == "_rebuild_tensor_v3";
  if (!v2 && !v3 && call.function != "_rebuild_tensor") refuse("{} is not supported", call.function);
  need(call, 4);
  const auto storage = storage_of(graph, call.args[0]);
  if (!storage) refuse("{}: of no storage", call.function);
  check_flags(graph, call, v3 ? 7 : 6);

  const Index offset = graph.integer(call.args[1]);
  StoredTensor tensor{dtype_for(graph, call, *storage),
                      std::string(storage->key),
                      storage->bytes,
                      storage->view_begin,
                      shape_argument(graph, call, 2, "sizes"),
                      shape_argument(graph, call, 3, "strides")};
  if (tensor.sizes.size() != tensor.strides.size()) {
    refuse("{} sizes but {} strides", tensor.sizes.size(), tensor.strides.size());
  }
  if (offset < 0) refuse("a negative storage offset {}", offset);
  // What it would take as a tensor of its own has to be countable too, zero strides or not.
  Index bytes = 0;
  if (__builtin_mul_overflow(shard::volume(tensor.sizes), static_cast<Index>(size_of(tensor.dtype)),
                             &bytes)) {
    refuse("sizes {} take more than 2^63 bytes", shard::to_string(tensor.sizes));
  }
  check_bounds(tensor, offset, storage->view_bytes);
  // A few bytes would keep whoever reads the tensor busy without end.
  if (bytes > kMostRepeated && static_cast<std::uint64_t>(bytes) > storage->view_bytes) {
    refuse("sizes {} with strides {} repeat the {} bytes of storage '{}' up to {}; at most {} are read so",
           shard::to_string(tensor.sizes), shard::to_string(tensor.strides), storage->view_bytes,
           tensor.storage, bytes, kMostRepeated);
  }
  if (bytes > 0) tensor.offset += static_cast<std::uint64_t>(offset) * size_of(tensor.dtype);
  return tensor;
}

}  // namespace

std::optional<StoredTensor> tensor_of(const Graph& graph, Ref ref) {
  const auto call = call_of(graph, ref);
  if (!call) return std::nullopt;
  return plain_tensor(graph, unwrapped(graph, *call));
}

std::optional<DType> dtype_of(const Graph& graph, Ref ref) {
  if (graph.kind(ref) != Kind::Symbol || graph.module(ref) != "torch") return std::nullopt;
  const auto dtype = shard::dtype_named(graph.name(ref));
  return dtype && torch_name(*dtype) == graph.name(ref) ? dtype : std::nullopt;
}

std::optional<shard::Shape> shape_of(const Graph& graph, Ref ref) {
  if (graph.is_object(ref, "torch", "Size")) {
    const auto args = graph.items(graph.args(ref));
    if (args.empty()) return shard::Shape();
    ref = args[0];
  }
  if (graph.kind(ref) != Kind::Tuple && graph.kind(ref) != Kind::List) return std::nullopt;
  shard::Shape shape;
  const auto items = graph.items(ref);
  shape.reserve(items.size());
  for (const Ref item : items) {
    if (graph.kind(item) != Kind::Int) return std::nullopt;
    shape.push_back(graph.integer(item));
  }
  return shape;
}

}  // namespace formats
