// The report as one page: no script, nothing from the network.
#include "cli/markup.h"
#include "cli/report_files.h"
#include "cli/validate_report.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

namespace cli {
namespace {

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

/// "0–3, 7"
std::string layer_ranges(const std::vector<shard::Index>& layers) {
  std::string out;
  for (std::size_t i = 0; i < layers.size();) {
    auto last = i;
    while (last + 1 < layers.size() && layers[last + 1] == layers[last] + 1) ++last;
    out += fmt::format("{}{}", out.empty() ? "" : ", ", layers[i]);
    if (last > i) out += fmt::format("–{}", layers[last]);
    i = last + 1;
  }
  return out;
}

/// One row a pipeline stage, one box a virtual chunk, ticks between tensor ranks.
std::string layout_diagram(const Validation& v) {
  const auto& p = v.pipeline;
  const auto tensor = v.layout ? v.layout->tp : 1;
  constexpr double kWidth = 720, kLeft = 70, kRow = 44;
  const auto width = (kWidth - kLeft) / static_cast<double>(p.chunks);
  std::string body;
  for (shard::Index stage = 0; stage < p.stages; ++stage) {
    const auto top = kRow * static_cast<double>(stage) + 4;
    body += fmt::format("<text x=\"0\" y=\"{}\">stage {}</text>", top + 22, stage);
    for (shard::Index chunk = 0; chunk < p.chunks; ++chunk) {
      const shard::Chunk here{stage, chunk};
      const auto left = kLeft + width * static_cast<double>(chunk), inner = width - 8;
      body += fmt::format("<rect x=\"{:.1f}\" y=\"{}\" width=\"{:.1f}\" height=\"36\"/>", left, top, inner);
      for (shard::Index rank = 1; rank < tensor && tensor <= 64; ++rank) {
        const auto x = left + inner * static_cast<double>(rank) / static_cast<double>(tensor);
        body += fmt::format("<line x1=\"{0:.1f}\" y1=\"{1}\" x2=\"{0:.1f}\" y2=\"{2}\"/>", x, top + 27, top + 36);
      }
      std::string text = here == p.embedding ? "embedding" : "";
      const auto add = [&](const std::string& more) { text += (text.empty() ? "" : " · ") + more; };
      if (!p.at(here).empty()) add(fmt::format("layer{} {}", p.at(here).size() > 1 ? "s" : "", layer_ranges(p.at(here))));
      if (p.mtp_layers > 0 && here == p.mtp) add(fmt::format("MTP × {}", p.mtp_layers));
      if (here == p.output) add("output");
      body += fmt::format("<text x=\"{:.1f}\" y=\"{}\" text-anchor=\"middle\">{}</text>", left + inner / 2, top + 18, escaped(text));
    }
  }
  return fmt::format("<figure><figcaption>Where the layers are stored: {}</figcaption><svg id=\"layout\" viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"pipeline stages and their layers\">{}</svg></figure>\n",
                     escaped(layout_text(v)), kWidth, kRow * static_cast<double>(p.stages), body);
}

/// Which parts read the embedding's table.
std::string tie_diagram(const Validation& v) {
  const auto& p = v.pipeline;
  struct Node {
    std::string what;
    shard::Index stage;
    bool same;  ///< tensor as the embedding
  };
  std::vector<Node> nodes{{"embedding", p.embedding.stage, true}};
  if (p.mtp_layers > 0) nodes.push_back({"MTP embedding", p.mtp.stage, true});
  nodes.push_back({"output", p.output.stage, v.tied});
  constexpr double kWidth = 720, kBox = 150, kTop = 22;
  const auto step = (kWidth - kBox - 1) / static_cast<double>(nodes.size() - 1);
  std::string body;
  for (std::size_t i = 0; i < nodes.size(); ++i) {
    const auto left = step * static_cast<double>(i);
    if (i > 0 && nodes[i].same) {
      const bool copied = nodes[i].stage != p.embedding.stage;
      body += fmt::format("<path d=\"M{:.1f},{} V8 H{:.1f} V{}\"/><text x=\"{:.1f}\" y=\"20\" text-anchor=\"middle\">{}</text>", kBox / 2, kTop, left + kBox / 2, kTop,
                          left - (step - kBox) / 2, copied ? "a copy of the same table" : "the same table");
    }
    body += fmt::format("<rect x=\"{0:.1f}\" y=\"{1}\" width=\"{2}\" height=\"36\"/><text x=\"{3:.1f}\" y=\"{4}\" text-anchor=\"middle\">{5}, stage {6}</text>", left, kTop, kBox,
                        left + kBox / 2, kTop + 22, nodes[i].what, nodes[i].stage);
  }
  return fmt::format("<figure><figcaption>{}</figcaption><svg id=\"ties\" viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"which parts share the embedding\">{}</svg></figure>\n",
                     v.tied ? "Tied: the output multiplies with the embedding's table" : "Not tied: the output has a table of its own", kWidth, kTop + 40, body);
}

}  // namespace

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
  std::vector<double> losses(v.token_loss.begin(), v.token_loss.end()), rms, weight_rms;
  const auto weights = layer_weights(v);
  for (const auto& layer : weights) weight_rms.push_back(layer.rms);
  for (const auto& stats : v.hidden) rms.push_back(stats.rms);
  body += "<h2>Layout</h2>\n" + layout_diagram(v) + tie_diagram(v);
  body += "<h2>Charts</h2>\n" + chart(losses, "Loss of each token", "token") + chart(rms, "Root mean square of the hidden state after each layer", "layer") +
          chart(weight_rms, "Root mean square of each layer's matrices", "layer");
  body += "<h2>Activations</h2>\n<table>\n<tr><th>after</th><th>rms</th><th>largest</th><th>not finite</th></tr>\n";
  for (const auto& stats : v.hidden) body += fmt::format("<tr><td>{}</td><td>{:.5g}</td><td>{:.5g}</td><td>{}</td></tr>\n", escaped(stats.name), stats.rms, stats.max_abs, stats.nonfinite);
  body += "</table>\n<h2>Weights</h2>\n<table>\n<tr><th>matrices of layer</th><th>rms</th><th>largest</th></tr>\n";
  for (const auto& layer : weights) body += fmt::format("<tr><td>{}</td><td>{:.5g}</td><td>{:.5g}</td></tr>\n", layer.layer, layer.rms, layer.max_abs);
  body += "</table>\n";
  for (const auto& note : v.notes) body += fmt::format("<p>{}</p>\n", escaped(note));
  write_text(path, "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\"><title>shardkit validate</title><style>"
                   "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}"
                   "table{border-collapse:collapse}th,td{text-align:left;padding:.15rem .8rem .15rem 0;border-bottom:1px solid #ddd;vertical-align:top}"
                   "h1{font-size:1.3rem;word-break:break-all}h2{font-size:1.05rem;margin-top:1.6rem}.good{color:#176b2c}.bad{color:#b00020;fill:#b00020}"
                   "figure{margin:1rem 0;overflow-x:auto}svg{width:100%;min-width:30rem;height:auto}svg text{font-size:11px;fill:#555}polyline{fill:none;stroke:#2458a6;stroke-width:1.5}line{stroke:#ccc}"
                   "rect{fill:#eef3fa;stroke:#2458a6}path{fill:none;stroke:#2458a6}td{word-break:break-word}"
                   "@media(prefers-color-scheme:dark){body{color:#ddd;background:#181a1d}th,td{border-color:#444}svg text{fill:#bbb}line{stroke:#555}rect{fill:#22303f;stroke:#7aa7e0}"
                   "path,polyline{stroke:#7aa7e0}.good{color:#6cc784}.bad{color:#ff7b8a;fill:#ff7b8a}}"
                   "</style></head><body>\n" + body + "</body></html>\n");
}

}  // namespace cli
