// Prints what a rank's GPTModel.sharded_state_dict() holds, for Megatron args and a rank given as JSON on stdin; one document a line:
//   {"args": {"num_layers": 2, …}, "rank": {"pipeline": 0, "chunk": 0, "tensor": 0, "data": 0},
//    "spec": "local" or "transformer_engine", "prefix": "", "metadata": {"non_homogeneous_layers": false, "singleton_local_shards": false}}
#include "formats/json.h"
#include "formats/megatron/gpt_model.h"
#include "libshard/error.h"

#include <iostream>

namespace {

using formats::pickle::Graph;
using formats::pickle::Ref;
using nlohmann::json;

/// The value as args would hold it.
Ref node(Graph& graph, const json& value) {
  if (value.is_boolean()) return graph.boolean(value.get<bool>());
  if (value.is_number_integer()) return graph.integer(value.get<shard::Index>());
  if (value.is_number()) return graph.real(value.get<double>());
  if (value.is_string()) return graph.text(value.get<std::string>());
  if (!value.is_array()) return graph.none();
  std::vector<Ref> items;
  for (const auto& item : value) items.push_back(node(graph, item));
  return graph.list(std::span<const Ref>(items));
}

Ref namespace_of(Graph& graph, const json& args) {
  const auto dict = graph.dict({});
  for (const auto& [name, value] : args.items()) graph.set(dict, name, node(graph, value));
  const auto space = graph.object(graph.symbol("argparse", "Namespace"), graph.empty_tuple(), true);
  graph.set_state(space, dict);
  return space;
}

json answer(const json& request) {
  Graph graph;
  const formats::megatron::Args args(graph, namespace_of(graph, request.at("args")));
  auto model = formats::megatron::gpt_model(graph, args);
  const auto parallel = formats::megatron::parallel_with_layout(graph, args);
  const auto metadata = request.value("metadata", json::object());
  model.non_homogeneous_layers |= metadata.value("non_homogeneous_layers", false);
  model.singleton_local_shards = metadata.value("singleton_local_shards", false);
  const auto spec = request.value("spec", "local");
  shard::require(spec == "local" || spec == "transformer_engine", shard::Code::Usage, [&] { return fmt::format("spec '{}': local and transformer_engine are known", spec); });
  model.spec = spec == "local" ? shard::LayerSpec::Local : shard::LayerSpec::TransformerEngine;
  const auto rank = request.value("rank", json::object());
  const auto at = [&](const char* name) { return rank.value(name, shard::Index{0}); };
  const auto depths = model.params.contains("mtp") ? model.params.at("mtp") : 0;
  const auto dict = shard::sharded_state_dict(model, parallel, shard::place_layers(parallel, model.params.at("layers"), depths),
                                              {at("pipeline"), at("chunk"), at("tensor"), at("data")}, request.value("prefix", ""));
  json out{{"tensors", json::array()}, {"objects", json::array()}};
  for (const auto& tensor : dict.tensors)
    out["tensors"].push_back({{"name", tensor.name}, {"key", tensor.key}, {"dtype", shard::torch_name(tensor.dtype)}, {"local_shape", tensor.local_shape},
                              {"global_shape", tensor.global_shape}, {"global_offset", tensor.global_offset}, {"axis_fragmentations", tensor.axis_fragmentations},
                              {"prepend_axis_num", tensor.prepend_axis_num}, {"replica_id", tensor.replica_id}, {"allow_shape_mismatch", tensor.allow_shape_mismatch}});
  for (const auto& object : dict.objects)
    out["objects"].push_back({{"name", object.name}, {"key", object.key}, {"global_shape", object.global_shape}, {"global_offset", object.global_offset},
                              {"replica_id", object.replica_id}});
  return out;
}

}  // namespace

int main() {
  for (std::string line; std::getline(std::cin, line);) {
    json out;
    try {
      out = answer(formats::parse_json(line, "stdin"));
    } catch (const std::exception& error) {
      out = {{"error", error.what()}};
    }
    std::cout << out.dump() << std::endl;
  }
}
