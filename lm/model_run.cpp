// One weight stream a pipeline stage, shared by its tensor ranks.
#include "lm/model_run.h"

#include "libshard/error.h"
#include "lm/check_config.h"
#include "lm/gather_report.h"

#include <algorithm>
#include <chrono>

namespace lm {

namespace {

/// How often an MTP layer is taken by steps, at most.
Index steps_of_a_layer(const shard::TransformerConfig& config, const ForwardRequest& request) {
  if (config.mtp_repeated_layer) return static_cast<Index>(request.steps.size());
  std::map<Index, Index> by_depth;
  Index most = 0;
  for (const auto& step : request.steps) most = std::max(most, ++by_depth[step.depth]);
  return most;
}

StagePlan plan_of(const LanguageModule& module, const WeightSource& source, const shard::TransformerConfig& config, const ForwardRequest& request, Index steps, int tensor_ranks) {
  StagePlan out{module.weight_uses(steps, request.mtp), {}, {}, {}, request.batch.batch * request.batch.length};
  for (const auto& table : module.gathered_weights())
    if (std::none_of(out.uses.begin(), out.uses.end(), [&](const auto& use) { return use.name == table; })) out.tables.push_back({table});
  out.readers = readers_of(source, out.uses, tensor_ranks);
  const auto more = readers_of(source, out.tables, tensor_ranks);
  out.readers.insert(out.readers.end(), more.begin(), more.end());
  for (int t = 0; t < tensor_ranks; ++t) {
    auto& parts = out.parts.emplace_back(parts_of(config, source, out.uses, {t, tensor_ranks}));
    parts.merge(parts_of(config, source, out.tables, {t, tensor_ranks}));
  }
  for (const auto& step : request.steps) out.rows = std::max(out.rows, step.in_hidden.rows());
  return out;
}

}  // namespace

RunReport run_model(const shard::Reader& from, const shard::Kernels& kernels, const shard::TransformerConfig& config, const ForwardRequest& request,
                    const RunOptions& options, Device& device) {
  using shard::Code;
  const auto start = std::chrono::steady_clock::now();
  check_config(config);
  const auto tp = options.tensor_parallel, pp = options.pipeline_parallel;
  shard::require(tp >= 1 && pp >= 1 && tp <= 64 && pp <= 64, Code::Usage, [&] { return fmt::format("--tp {} --pp {}: should be 1 to 64", tp, pp); });
  shard::require(tp <= config.num_attention_heads, Code::BadLayout,
                 [&] { return fmt::format("layout: tensor parallel size {} for {} attention heads", tp, config.num_attention_heads); });
  WeightSource source(from, kernels, options.compute);
  RunReport report;
  std::mutex mutex;
  auto* const processes = options.processes;
  shard::require(!processes || tp * pp == processes->size(), Code::Usage, [&] { return fmt::format("--tp {} --pp {}: are {} ranks; {} processes were started", tp, pp, tp * pp, processes->size()); });
  const Ranks ranks{tp, pp, options.compute, processes ? options.threads : std::max(1u, options.threads / static_cast<unsigned>(tp)), options.stop, processes};

  // What each stage takes is known from its place alone.
  std::vector<StagePlan> plans;
  {
    const auto nowhere = host_device();
    nowhere->prepare({}, config, {});
    Group alone(1);
    const auto comm = nowhere->comm(alone, Device::Axis::Tensor, 0, 0);
    std::vector<WeightUse> all;
    for (int p = 0; p < pp; ++p) {
      const LanguageModule stage(config, source, placement_of(config, p, pp), *comm, *comm, nowhere->ops(0, 0));
      plans.push_back(plan_of(stage, source, config, request, steps_of_a_layer(config, request), tp));
      all.insert(all.end(), plans.back().uses.begin(), plans.back().uses.end());
    }
    refuse_unused(from.describe(), all);
  }
  if (processes) agree(*processes, ranks, plans, request);
  device.prepare(ranks, config, plans);

  std::vector<std::unique_ptr<Group>> tensor_groups, pipeline_groups;
  for (int p = 0; p < pp; ++p) tensor_groups.push_back(std::make_unique<Group>(tp));
  for (int t = 0; t < tp; ++t) pipeline_groups.push_back(std::make_unique<Group>(pp));
  std::vector<std::unique_ptr<WeightStream>> streams(static_cast<std::size_t>(pp));
  for (int p = 0; p < pp; ++p)
    if (!processes || processes->rank() / tp == p)
      streams[static_cast<std::size_t>(p)] = std::make_unique<WeightStream>(source, device.takes(p), processes ? options.memory : options.memory / static_cast<std::uint64_t>(pp), options.stop, ranks.threads);
  const auto fail = [&] {
    if (processes) return;                     // the others must hear why before they find this rank's end of the device's links closed
    for (auto& group : tensor_groups) group->fail();
    for (auto& group : pipeline_groups) group->fail();
    device.fail();
  };
  std::vector<double> brought(static_cast<std::size_t>(tp * pp));  // seconds that a rank's weights took to its device's memory, waiting included
  run_ranks(processes ? 1 : tp * pp, fail, [&](int thread) {
    const auto rank = processes ? processes->rank() : thread;
    const auto p = rank / tp, t = rank % tp;
    auto& stream = *streams[static_cast<std::size_t>(p)];
    auto& ops = device.ops(p, t);
    const auto tensor = device.comm(*tensor_groups[static_cast<std::size_t>(p)], Device::Axis::Tensor, p, t),
               pipeline = device.comm(*pipeline_groups[static_cast<std::size_t>(t)], Device::Axis::Pipeline, p, t);
    LanguageModule module(config, source, placement_of(config, p, pp), *tensor, *pipeline, ops);
    const auto asked = std::chrono::steady_clock::now();
    auto& weights = device.weights(stream, p, t);
    brought[static_cast<std::size_t>(rank)] = std::chrono::duration<double>(std::chrono::steady_clock::now() - asked).count();
    module.forward(weights, request, report.result, mutex);
    if (t == 0 || processes) stream.drain();
  });
  report.load_seconds = *std::max_element(brought.begin(), brought.end());
  for (const auto& stream : streams)
    if (stream) report.load_seconds = std::max(report.load_seconds, stream->waited_seconds() / (processes ? 1 : tp));
  const shard::Budget budget{.threads = options.threads, .stop = options.stop};
  if (processes) {
    gather_report(*processes, ranks, source, budget, report);
  } else {
    report.findings = source.findings(budget);
    report.weights = source.stats();
    report.bytes_read = source.bytes_read();
  }
  report.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  // Stages finish their notes in any order.
  const auto place = [](const HiddenStats& stats) -> std::pair<int, long> {
    if (stats.name == "embedding") return {0, 0};
    if (stats.name.starts_with("layer ")) return {1, std::stol(stats.name.substr(6))};
    return {stats.name == "final_norm" ? 2 : 3, stats.name.starts_with("mtp ") ? std::stol(stats.name.substr(4)) : 0};
  };
  std::stable_sort(report.result.hidden.begin(), report.result.hidden.end(), [&](const auto& a, const auto& b) { return place(a) < place(b); });
  return report;
}

}  // namespace lm
