// The same figures as JSON, JUnit XML and text; numbers that are not finite become null in JSON.
#include "cli/validate_report.h"

#include "cli/markup.h"
#include "cli/report_files.h"
#include "libshard/error.h"

#include <algorithm>
#include <cmath>
#include <map>

namespace cli {
namespace {

Json number(double value) { return std::isfinite(value) ? Json(value) : Json(nullptr); }

}  // namespace

std::string layout_text(const Validation& v) {
  std::string out = v.layout ? layout_line(*v.layout) : std::string();
  return out.empty() ? "one part" : out;
}

std::vector<LayerWeights> layer_weights(const Validation& v) {
  struct Sums {
    double squares = 0, elements = 0, max_abs = 0;
  };
  std::map<shard::Index, Sums> layers;
  for (const auto& weight : v.weights) {
    constexpr std::string_view kLayers = "layers.";
    if (!weight.matrix || !weight.name.starts_with(kLayers)) continue;
    auto& sums = layers[std::stol(weight.name.substr(kLayers.size()))];
    sums.squares += weight.rms * weight.rms * static_cast<double>(weight.elements);
    sums.elements += static_cast<double>(weight.elements);
    sums.max_abs = std::max(sums.max_abs, weight.max_abs);
  }
  std::vector<LayerWeights> out;
  for (const auto& [layer, sums] : layers) out.push_back({layer, std::sqrt(sums.squares / sums.elements), sums.max_abs});
  return out;
}

bool Validation::ok() const {
  return std::all_of(checks.begin(), checks.end(), [](const Check& c) { return c.ok; }) &&
         std::none_of(findings.begin(), findings.end(), [](const shard::Finding& f) { return f.severity == shard::Finding::Severity::Error; });
}

Json validation_json(const Validation& v) {
  Json out{{"ok", v.ok()}, {"device", v.device}, {"family", v.family}, {"layout", layout_json(v.layout)}, {"tokens", v.tokens}, {"loss", number(v.loss)},
           {"loss_true_vocab", number(v.loss_true_vocab)}, {"perplexity", number(std::exp(v.loss_true_vocab))},
           {"tokens_per_second", number(static_cast<double>(v.tokens) / v.forward_seconds)},
           {"seconds", {{"load", v.load_seconds}, {"forward", v.forward_seconds}, {"all", v.all_seconds}}}};
  if (v.reference)
    out["reference"] = {{"max_abs_logits", v.reference->logits ? number(v.reference->max_abs_logits) : Json(nullptr)},
                        {"mean_abs_logits", v.reference->logits ? number(v.reference->mean_abs_logits()) : Json(nullptr)},
                        {"max_abs_loss", v.reference->loss ? number(v.reference->max_abs_loss) : Json(nullptr)},
                        {"mean_abs_loss", v.reference->loss ? number(v.reference->mean_abs_loss) : Json(nullptr)}};
  else out["reference"] = nullptr;
  out["mtp"] = Json::array();
  for (const auto& m : v.mtp) {
    Json one{{"depth", m.depth}, {"loss", number(m.loss)}, {"scaled_loss", number(m.scaled_loss)},
             {"max_abs_logits", m.figures && m.figures->logits ? number(m.figures->max_abs_logits) : Json(nullptr)},
             {"max_abs_loss", m.figures && m.figures->loss ? number(m.figures->max_abs_loss) : Json(nullptr)}};
    one["step"] = nullptr;
    if (m.step)
      one["step"] = {{"max_abs_hidden", m.step->hidden ? number(m.step->max_abs_hidden) : Json(nullptr)},
                     {"max_abs_logits", m.step->logits ? number(m.step->max_abs_logits) : Json(nullptr)}};
    out["mtp"].push_back(std::move(one));
  }
  out["findings"] = findings_json(v.findings);
  out["checks"] = Json::array();
  for (const auto& check : v.checks) out["checks"].push_back({{"name", check.name}, {"ok", check.ok}, {"figure", check.figure}});
  out["input"] = v.input;
  out["compute"] = v.compute;
  out["run"] = {{"tp", v.tp}, {"pp", v.pp}};
  out["peak_logit"] = number(v.peak_logit);
  out["bytes_read"] = v.bytes_read;
  out["peak_memory_bytes"] = peak_memory();
  out["activations"] = Json::array();
  for (const auto& stats : v.hidden)
    out["activations"].push_back({{"name", stats.name}, {"rms", number(stats.rms)}, {"max_abs", number(stats.max_abs)}, {"nonfinite", stats.nonfinite}});
  out["weights"] = Json::array();
  for (const auto& layer : layer_weights(v)) out["weights"].push_back({{"layer", layer.layer}, {"rms", number(layer.rms)}, {"max_abs", number(layer.max_abs)}});
  out["notes"] = v.notes;
  return out;
}

void print_validation(const Validation& v) {
  print_findings(v.findings);
  for (const auto& note : v.notes) print_line(fmt::format("note: {}", note));
  print_line(fmt::format("{}: {}, {}; {} on {} ({})", v.path, v.family, layout_text(v), v.compute, v.device, v.input));
  print_line(fmt::format("loss {:.6f} over the true vocabulary of {} (perplexity {:.4g}), {:.6f} over the stored one; {} tokens, {:.0f} tokens/s, {:.2f} s",
                         v.loss_true_vocab, v.vocab, std::exp(v.loss_true_vocab), v.loss, v.tokens, static_cast<double>(v.tokens) / v.forward_seconds, v.all_seconds));
  for (const auto& m : v.mtp) print_line(fmt::format("MTP depth {}: loss {:.6f}", m.depth, m.loss));
  for (const auto& check : v.checks) print_line(fmt::format("{}  {}: {}", check.ok ? "ok  " : "FAIL", check.name, check.figure));
  print_line(v.ok() ? "sound" : "NOT sound");
}

void write_validation_junit(const std::string& path, const Validation& v) {
  std::string cases;
  std::size_t failures = 0;
  const auto add = [&](const std::string& name, bool ok, const std::string& text) {
    cases += fmt::format("  <testcase classname=\"shardkit.validate\" name=\"{}\"", escaped(name));
    if (ok) cases += "/>\n";
    else cases += fmt::format("><failure message=\"{}\">{}</failure></testcase>\n", escaped(text.substr(0, text.find('\n'))), escaped(text)), ++failures;
  };
  std::string weights;
  for (const auto& finding : v.findings)
    if (finding.severity == shard::Finding::Severity::Error) weights += fmt::format("{}: {}: {}\n", finding.rule, finding.key, finding.message);
  add("weights", weights.empty(), weights);
  for (const auto& check : v.checks) add(check.name, check.ok, check.figure);
  write_text(path, fmt::format("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuite name=\"shardkit validate {}\" tests=\"{}\" failures=\"{}\" time=\"{:.3f}\">\n{}</testsuite>\n",
                               escaped(v.path), v.checks.size() + 1, failures, v.all_seconds, cases));
}

}  // namespace cli
