// One weight stream a pipeline stage, shared by its tensor ranks.
#include "lm/model_run.h"

#include "libshard/error.h"
#include "lm/check_config.h"

#include <algorithm>
#include <chrono>

namespace lm {

RunReport run_model(const shard::Reader& from, const shard::Kernels& kernels, const shard::TransformerConfig& config, const ForwardRequest& request,
                    const RunOptions& options) {
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
  std::vector<std::unique_ptr<Group>> tensor_groups, pipeline_groups;
  for (int p = 0; p < pp; ++p) tensor_groups.push_back(std::make_unique<Group>(tp));
  for (int t = 0; t < tp; ++t) pipeline_groups.push_back(std::make_unique<Group>(pp));
  const Context on{options.compute, std::max(1u, options.threads / static_cast<unsigned>(tp))};
  std::vector<std::unique_ptr<LanguageModule>> modules;
  std::vector<std::unique_ptr<WeightStream>> streams;
  std::vector<WeightUse> all;
  const auto steps = [&](Index) {
    std::map<Index, Index> by_depth;
    for (const auto& step : request.steps) ++by_depth[step.depth];
    Index most = 0;
    for (const auto& [depth, count] : by_depth) most = std::max(most, config.mtp_repeated_layer ? static_cast<Index>(request.steps.size()) : count);
    return most;
  }(0);
  for (int p = 0; p < pp; ++p)
    for (int t = 0; t < tp; ++t) {
      modules.push_back(std::make_unique<LanguageModule>(config, source, placement_of(config, p, pp), Comm(*tensor_groups[static_cast<std::size_t>(p)], t),
                                                         Comm(*pipeline_groups[static_cast<std::size_t>(t)], p), on));
      if (t > 0) continue;
      auto uses = modules.back()->weight_uses(steps, request.mtp);
      all.insert(all.end(), uses.begin(), uses.end());
    }
  refuse_unused(from.describe(), all);
  for (int p = 0; p < pp; ++p) {
    auto uses = modules[static_cast<std::size_t>(p * tp)]->weight_uses(steps, request.mtp);
    streams.push_back(std::make_unique<WeightStream>(source, std::move(uses), options.memory / static_cast<std::uint64_t>(pp), options.stop, on.threads));
  }
  const auto fail = [&] {
    for (auto& group : tensor_groups) group->fail();
    for (auto& group : pipeline_groups) group->fail();
  };
  run_ranks(tp * pp, fail, [&](int rank) {
    const auto p = static_cast<std::size_t>(rank / tp);
    modules[static_cast<std::size_t>(rank)]->forward(*streams[p], request, report.result, mutex);
    if (rank % tp == 0) streams[p]->drain();
  });
  report.findings = source.findings(options.threads);
  report.weights = source.stats();
  report.bytes_read = source.bytes_read();
  for (const auto& stream : streams) report.load_seconds = std::max(report.load_seconds, stream->waited_seconds() / tp);
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
