// What a torch pickle says about tensors: which storage, dtype, offset, sizes and strides. Refuses a tensor that does
// not lie within its storage, and every kind that is not plain memory.
#include "formats/torch_save.h"

#include <array>
#include <utility>

#include "formats/torch_storage.h"
#include "libshard/error.h"

namespace formats {
namespace {

using pickle::Graph;
using pickle::Kind;
using pickle::Ref;
using shard::Code;
using shard::DType;

template <typename... Args>
[[noreturn]] void refuse(fmt::format_string<Args...> format, Args&&... args) {
  throw shard::Error(Code::BadFormat, "tensor: " + fmt::format(format, std::forward<Args>(args)...));
}

/// A call that makes a tensor: function name and arguments.
struct Call {
  std::string_view name;
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
  if (call.args.size() < least) refuse("{} has {} arguments; at least {}", call.name, call.args.size(), least);
}

/// The call inside _rebuild_from_type_v2(function, type, arguments, state).
Call from_type(const Graph& graph, const Call& call) {
  need(call, 3);
  const Ref function = call.args[0], type = call.args[1];
  if (!graph.is_symbol(type, "torch", "Tensor") && !graph.is_symbol(type, "torch.nn.parameter", "Parameter")) {
    const bool named = graph.kind(type) == Kind::Symbol;
    refuse("a tensor subclass {} is not supported", named ? graph.name(type) : "without a name");
  }
  if (!is_rebuild(graph, function)) refuse("_rebuild_from_type_v2 of no known function");
  return {graph.name(function), graph.items(graph.args_of(call.args[2]))};
}

}  // namespace
}  // namespace formats
