// The same figures in four forms; numbers that are not finite become null in JSON.
#include "cli/validate_report.h"

#include "cli/markup.h"
#include "libshard/error.h"

#include <algorithm>
#include <cmath>
#include <fstream>

namespace cli {
namespace {

Json number(double value) { return std::isfinite(value) ? Json(value) : Json(nullptr); }

void write_file(const std::string& path, const std::string& text) {
  std::ofstream file(path, std::ios::binary);
  file << text;
  file.flush();
  shard::require(file.good(), shard::Code::Io, [&] { return fmt::format("{}: cannot write", path); });
}

std::string layout_text(const Validation& v) {
  std::string out = v.layout ? layout_line(*v.layout) : std::string();
  return out.empty() ? "one part" : out;
}

/// A line through values, in a box of fixed size.
std::string chart(const std::vector<double>& values, const std::string& title, const std::string& x_name) {
  constexpr double kWidth = 720, kHeight = 200, kLeft = 60, kBottom = 24, kTop = 10;
  double low = 0, high = 1;
  bool first = true;
  for (const auto value : values) {
    if (!std::isfinite(value)) continue;
    low = first ? value : std::min(low, value);
    high = first ? value : std::max(high, value);
    first = false;
  }
  if (high <= low) high = low + 1;
  std::string points, gaps;
  for (std::size_t i = 0; i < values.size(); ++i) {
    const auto x = kLeft + (kWidth - kLeft) * (values.size() > 1 ? static_cast<double>(i) / static_cast<double>(values.size() - 1) : 0.5);
    if (std::isfinite(values[i])) points += fmt::format("{:.1f},{:.1f} ", x, kTop + (kHeight - kTop - kBottom) * (high - values[i]) / (high - low));
    else gaps += fmt::format("<circle cx=\"{:.1f}\" cy=\"{}\" r=\"3\" class=\"bad\"/>", x, kTop);
  }
  return fmt::format("<figure><figcaption>{}</figcaption><svg viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"{}\">"
                     "<text x=\"0\" y=\"{}\">{:.4g}</text><text x=\"0\" y=\"{}\">{:.4g}</text><text x=\"{}\" y=\"{}\">{}</text>"
                     "<line x1=\"{}\" y1=\"{}\" x2=\"{}\" y2=\"{}\"/><polyline points=\"{}\"/>{}</svg></figure>\n",
                     escaped(title), kWidth, kHeight, escaped(title), kTop + 10, high, kHeight - kBottom, low, kLeft, kHeight - 4, escaped(x_name), kLeft,
                     kHeight - kBottom, kWidth, kHeight - kBottom, points, gaps);
}

}  // namespace

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
                        {"max_abs_loss", v.reference->loss ? number(v.reference->max_abs_loss) : Json(nullptr)},
                        {"mean_abs_loss", v.reference->loss ? number(v.reference->mean_abs_loss) : Json(nullptr)}};
  else out["reference"] = nullptr;
  out["mtp"] = Json::array();
  for (const auto& m : v.mtp) {
    Json one{{"depth", m.depth}, {"loss", number(m.loss)},
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
  out["notes"] = v.notes;
  return out;
}

void print_validation(const Validation& v) {
  print_findings(v.findings);
  for (const auto& note : v.notes) fmt::print("note: {}\n", note);
  fmt::print("{}: {}, {}; {} on {} ({})\n", v.path, v.family, layout_text(v), v.compute, v.device, v.input);
  fmt::print("loss {:.6f} over the true vocabulary of {} (perplexity {:.4g}), {:.6f} over the stored one; {} tokens, {:.0f} tokens/s, {:.2f} s\n", v.loss_true_vocab,
             v.vocab, std::exp(v.loss_true_vocab), v.loss, v.tokens, static_cast<double>(v.tokens) / v.forward_seconds, v.all_seconds);
  for (const auto& m : v.mtp) fmt::print("MTP depth {}: loss {:.6f}\n", m.depth, m.loss);
  for (const auto& check : v.checks) fmt::print("{}  {}: {}\n", check.ok ? "ok  " : "FAIL", check.name, check.figure);
  fmt::print("{}\n", v.ok() ? "sound" : "NOT sound");
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
  write_file(path, fmt::format("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuite name=\"shardkit validate {}\" tests=\"{}\" failures=\"{}\" time=\"{:.3f}\">\n{}</testsuite>\n",
                               escaped(v.path), v.checks.size() + 1, failures, v.all_seconds, cases));
}

void write_validation_html(const std::string& path, const Validation& v) {
  std::string body = fmt::format("<h1>{}</h1>\n<p class=\"{}\">{}</p>\n", escaped(v.path), v.ok() ? "good" : "bad", v.ok() ? "sound" : "NOT sound");
  const auto row = [](const std::string& a, const std::string& b) { return fmt::format("<tr><th>{}</th><td>{}</td></tr>\n", escaped(a), escaped(b)); };
  body += "<table>\n" + row("family", v.family) + row("stored layout", layout_text(v)) + row("computed as", fmt::format("{} on {}, TP {} PP {}", v.compute, v.device, v.tp, v.pp)) +
          row("input", fmt::format("{} ({} tokens)", v.input, v.tokens)) + row("loss, true vocabulary", fmt::format("{:.6f} (perplexity {:.4g})", v.loss_true_vocab, std::exp(v.loss_true_vocab))) +
          row("loss, stored vocabulary", fmt::format("{:.6f}", v.loss)) + row("largest logit", fmt::format("{:.4g}", v.peak_logit)) +
          row("time", fmt::format("{:.2f} s, {:.0f} tokens/s", v.all_seconds, static_cast<double>(v.tokens) / v.forward_seconds));
  for (const auto& m : v.mtp) body += row(fmt::format("MTP depth {}", m.depth), fmt::format("loss {:.6f}", m.loss));
  body += "</table>\n<h2>Checks</h2>\n<table>\n";
  for (const auto& check : v.checks) body += fmt::format("<tr class=\"{}\"><th>{}</th><td>{}</td><td>{}</td></tr>\n", check.ok ? "good" : "bad", escaped(check.name), check.ok ? "ok" : "FAIL", escaped(check.figure));
  body += "</table>\n<h2>Findings</h2>\n";
  if (v.findings.empty()) body += "<p>none</p>\n";
  else {
    body += "<table>\n";
    for (const auto& f : v.findings) body += fmt::format("<tr><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>\n", name(f.severity), escaped(f.rule), escaped(f.key), escaped(f.message));
    body += "</table>\n";
  }
  std::vector<double> losses(v.token_loss.begin(), v.token_loss.end()), rms;
  for (const auto& stats : v.hidden) rms.push_back(stats.rms);
  body += "<h2>Charts</h2>\n" + chart(losses, "Loss of each token", "token") + chart(rms, "Root mean square of the hidden state after each layer", "layer");
  body += "<h2>Activations</h2>\n<table>\n<tr><th>after</th><th>rms</th><th>largest</th><th>not finite</th></tr>\n";
  for (const auto& stats : v.hidden) body += fmt::format("<tr><td>{}</td><td>{:.5g}</td><td>{:.5g}</td><td>{}</td></tr>\n", escaped(stats.name), stats.rms, stats.max_abs, stats.nonfinite);
  body += "</table>\n";
  for (const auto& note : v.notes) body += fmt::format("<p>{}</p>\n", escaped(note));
  write_file(path, "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>shardkit validate</title><style>"
                   "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}"
                   "table{border-collapse:collapse}th,td{text-align:left;padding:.15rem .8rem .15rem 0;border-bottom:1px solid #ddd;vertical-align:top}"
                   "h1{font-size:1.3rem;word-break:break-all}h2{font-size:1.05rem;margin-top:1.6rem}.good{color:#176b2c}.bad{color:#b00020;fill:#b00020}"
                   "figure{margin:1rem 0}svg{width:100%;height:auto}svg text{font-size:11px;fill:#555}polyline{fill:none;stroke:#2458a6;stroke-width:1.5}line{stroke:#ccc}"
                   "</style></head><body>\n" + body + "</body></html>\n");
}

}  // namespace cli
