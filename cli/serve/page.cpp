// No script and nothing from the network: a table, <details> and inline SVG.
#include "cli/serve/page.h"

#include "cli/markup.h"

#include <fmt/chrono.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>

namespace cli {
namespace {

/// A history may be damaged: null where an answer is no JSON.
Json answer_of(const Record& r) {
  auto answer = r.answer.empty() ? Json() : Json::parse(r.answer, nullptr, false);
  return answer.is_discarded() ? Json() : answer;
}

std::string when(double started) {
  constexpr double kYear10000 = 253'402'300'800;
  if (!(started >= 0 && started < kYear10000)) return "–";
  return fmt::format("{:%Y-%m-%d %H:%M:%S}", fmt::gmtime(static_cast<std::time_t>(started)));
}

/// "run/iter_0000010" belongs to the chart of "run"; so does the run folder itself.
std::string run_of(const std::string& checkpoint) {
  const auto slash = checkpoint.rfind('/');
  const auto last = slash == checkpoint.npos ? checkpoint : checkpoint.substr(slash + 1);
  if (!last.starts_with("iter_") && last != "release") return checkpoint;
  return slash == checkpoint.npos ? "." : checkpoint.substr(0, slash);
}

std::string chart(const std::string& run, const std::vector<const Record*>& points) {
  constexpr double kWidth = 720, kHeight = 180, kLeft = 70, kBottom = 20, kTop = 10;
  double low = INFINITY, high = -INFINITY;
  for (const auto* p : points) {
    low = std::min(low, *p->loss);
    high = std::max(high, *p->loss);
  }
  const double room = std::max(high - low, std::max(1e-9, std::abs(high) * 1e-6));
  std::string line, dots;
  for (std::size_t i = 0; i < points.size(); ++i) {
    const auto& p = *points[i];
    const double x = kLeft + (kWidth - kLeft - 10) * (points.size() == 1 ? 0.5 : static_cast<double>(i) / static_cast<double>(points.size() - 1));
    const double y = kTop + (kHeight - kTop - kBottom) * (1 - (*p.loss - low) / room);
    line += fmt::format("{:.1f},{:.1f} ", x, y);
    dots += fmt::format("<a href=\"#v{}\"><circle class=\"{}\" cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"4\"><title>{}: {:.6f}</title></circle></a>", p.id, name(p.state), x, y, escaped(p.checkpoint), *p.loss);
  }
  return fmt::format("<figure><figcaption>Loss, {0}</figcaption><svg viewBox=\"0 0 {1} {2}\" role=\"img\" aria-label=\"Loss by checkpoint of {0}\"><line x1=\"{3}\" y1=\"{4}\" x2=\"{3}\" y2=\"{5}\"/>"
                     "<line x1=\"{3}\" y1=\"{5}\" x2=\"{1}\" y2=\"{5}\"/><text x=\"0\" y=\"{6}\">{7:.5f}</text><text x=\"0\" y=\"{5}\">{8:.5f}</text><polyline points=\"{9}\"/>{10}</svg></figure>\n",
                     escaped(run), kWidth, kHeight, kLeft, kTop, kHeight - kBottom, kTop + 10, high, low, line, dots);
}

std::string number(const Json& object, const char* key) {
  const auto at = object.find(key);
  return at != object.end() && at->is_number() ? fmt::format("{:.6g}", at->get<double>()) : "–";
}
std::string text(const Json& object, const char* key) {
  const auto at = object.find(key);
  return at == object.end() || at->is_null() ? "–" : at->is_string() ? at->get<std::string>() : at->dump(-1, ' ', false, Json::error_handler_t::replace);
}
std::string row(const std::string& a, const std::string& b) { return fmt::format("<tr><th>{}</th><td>{}</td></tr>\n", escaped(a), escaped(b)); }

std::string list(const Json& answer, const char* key, const std::string& title, std::initializer_list<const char*> columns) {
  const auto at = answer.find(key);
  if (at == answer.end() || !at->is_array() || at->empty()) return "";
  std::string out = fmt::format("<h3>{}</h3><table><tr>", title);
  for (const auto* column : columns) out += fmt::format("<th>{}</th>", column);
  out += "</tr>\n";
  for (const auto& one : *at) {
    out += "<tr>";
    for (const auto* column : columns) out += fmt::format("<td>{}</td>", escaped(text(one, column)));
    out += "</tr>\n";
  }
  return out + "</table>\n";
}

/// Findings about copies of tied or replicated weights are what "ties" asks for.
std::string ties(const Json& answer) {
  std::size_t broken = 0;
  if (const auto at = answer.find("findings"); at != answer.end())
    for (const auto& finding : *at) broken += text(finding, "rule") == "tie" || text(finding, "rule") == "replica";
  return broken ? fmt::format("{} differ", broken) : "agree";
}

std::string drill_down(const Record& r, const Json& answer) {
  std::string out = "<table>\n";
  if (!r.error.empty()) out += row("error", fmt::format("{} (status {})", r.error, r.status));
  if (answer.is_object()) {
    for (const char* key : {"family", "layout", "compute", "run", "input", "device", "tokens"}) out += row(key, text(answer, key));
    for (const char* key : {"loss_true_vocab", "loss", "perplexity", "peak_logit", "tokens_per_second"}) out += row(key, number(answer, key));
    out += row("seconds", text(answer, "seconds"));
    if (const auto at = answer.find("reference"); at != answer.end() && !at->is_null()) out += row("reference", text(answer, "reference"));
  }
  out += "</table>\n";
  if (answer.is_object())
    out += list(answer, "checks", "Checks", {"name", "ok", "figure"}) + list(answer, "findings", "Findings", {"severity", "rule", "key", "message"}) +
           list(answer, "mtp", "MTP", {"depth", "loss", "max_abs_logits", "max_abs_loss"}) + list(answer, "activations", "Activations", {"name", "rms", "max_abs", "nonfinite"});
  return out;
}

}  // namespace

Json record_json(const Record& r, bool answer) {
  Json out{{"id", r.id}, {"checkpoint", r.checkpoint}, {"origin", r.origin}, {"state", name(r.state)}, {"status", r.status}, {"started", r.started}, {"seconds", r.seconds},
           {"loss", r.loss ? Json(*r.loss) : Json(nullptr)}, {"error", r.error.empty() ? Json(nullptr) : Json(r.error)}};
  if (answer) out["answer"] = answer_of(r);
  return out;
}

std::string history_page(const std::vector<Record>& records, const std::string& root, std::size_t queued, bool running) {
  std::map<std::string, std::vector<const Record*>> runs;
  for (auto r = records.rbegin(); r != records.rend(); ++r)
    if (r->loss && std::isfinite(*r->loss)) runs[run_of(r->checkpoint)].push_back(&*r);
  std::string charts, rows;
  std::size_t shown = 0;
  for (const auto& [run, points] : runs)
    if (points.size() > 1 && ++shown <= 12) charts += chart(run, points);
  for (const auto& r : records) {
    const auto answer = answer_of(r);
    const auto findings = answer.is_object() && answer.contains("findings") ? std::to_string(answer["findings"].size()) : "–";
    rows += fmt::format("<tr id=\"v{0}\"><td>{0}</td><td>{1}</td><td class=\"path\">{2}</td><td class=\"{3}\">{3}</td><td>{4}</td><td>{5}</td><td>{6}</td><td>{7:.2f}</td><td>{8}</td>"
                        "<td><details><summary>more</summary>{9}<p><a href=\"/history/{0}\">JSON</a></p></details></td></tr>\n",
                        r.id, when(r.started), escaped(r.checkpoint), name(r.state), r.loss ? fmt::format("{:.6f}", *r.loss) : "–", answer.is_object() ? ties(answer) : "–", findings, r.seconds,
                        escaped(r.origin), drill_down(r, answer));
  }
  return fmt::format("<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\"><title>shardkit serve</title><style>"
                     "body{{font:15px/1.5 system-ui,sans-serif;max-width:76rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}}"
                     "table{{border-collapse:collapse}}th,td{{text-align:left;padding:.15rem .8rem .15rem 0;border-bottom:1px solid #ddd;vertical-align:top}}"
                     "h1{{font-size:1.3rem}}h3{{font-size:1rem;margin:.8rem 0 .2rem}}.path{{word-break:break-all}}.sound{{color:#176b2c;fill:#176b2c}}.bad,.error{{color:#b00020;fill:#b00020}}"
                     ".interrupted,.running{{color:#7a5b00}}figure{{margin:1rem 0}}svg{{width:100%;height:auto}}svg text{{font-size:11px;fill:#555}}"
                     "polyline{{fill:none;stroke:#2458a6;stroke-width:1.5}}line{{stroke:#ccc}}</style></head><body>\n<h1>shardkit serve</h1>\n<p>root {}; {} waiting, {} running; times are UTC</p>\n{}"
                     "<table><thead><tr><th>#</th><th>started</th><th>checkpoint</th><th>verdict</th><th>loss</th><th>ties</th><th>findings</th><th>seconds</th><th>asked by</th><th></th></tr></thead>\n"
                     "<tbody>\n{}</tbody></table>\n{}</body></html>\n",
                     escaped(root), queued, running ? 1 : 0, charts, rows, records.empty() ? "<p>nothing validated yet</p>\n" : "");
}

}  // namespace cli
