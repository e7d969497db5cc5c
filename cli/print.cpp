// Plain text first: colours only on a terminal, and not where NO_COLOR is set.
#include "cli/print.h"

#include "cli/markup.h"

#include <fmt/color.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include <sys/ioctl.h>
#include <sys/resource.h>
#include <unistd.h>

namespace cli {
namespace {

std::size_t terminal_width() {
  winsize size{};
  if (isatty(STDOUT_FILENO) && ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 20) return size.ws_col;
  return 0;
}

bool colour() { return isatty(STDOUT_FILENO) && !std::getenv("NO_COLOR"); }

}  // namespace

std::string human_bytes(std::uint64_t bytes) {
  static constexpr const char* kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB"};
  auto value = static_cast<double>(bytes);
  std::size_t unit = 0;
  while (value >= 1024 && unit + 1 < std::size(kUnits)) value /= 1024, ++unit;
  return unit == 0 ? fmt::format("{} B", bytes) : fmt::format("{:.1f} {}", value, kUnits[unit]);
}

std::string human_count(std::uint64_t count) {
  if (count >= 1'000'000'000) return fmt::format("{:.2f} B", static_cast<double>(count) / 1e9);
  if (count >= 1'000'000) return fmt::format("{:.2f} M", static_cast<double>(count) / 1e6);
  return std::to_string(count);
}

std::string layout_line(const shard::Parallel& p) {
  auto out = fmt::format("TP {}, PP {}", p.tp, p.pp);
  if (p.vpp > 1) out += fmt::format(", VPP {}", p.vpp);
  if (p.ep > 1) out += fmt::format(", EP {}", p.ep);
  if (p.etp != p.tp) out += fmt::format(", ETP {}", p.etp);
  if (!p.pp_layout.empty()) out += fmt::format(", stages {}", p.pp_layout);
  return out;
}

Json layout_json(const std::optional<shard::Parallel>& p) {
  if (!p) return nullptr;
  Json out{{"tp", p->tp}, {"pp", p->pp}, {"vpp", p->vpp}, {"ep", p->ep}, {"etp", p->etp}};
  if (!p->pp_layout.empty()) out["pp_layout"] = p->pp_layout;
  if (p->first_stage_layers) out["first_stage_layers"] = *p->first_stage_layers;
  if (p->last_stage_layers) out["last_stage_layers"] = *p->last_stage_layers;
  return out;
}

void print_error(std::string_view text) { fmt::print(stderr, "shardkit: error: {}\n", one_line(text)); }

void print_line(std::string_view text) { fmt::print("{}\n", one_line(text)); }

void print_json(const Json& json) {
  fmt::print("{}\n", json.dump(2, ' ', false, Json::error_handler_t::replace));
}

Json findings_json(const std::vector<shard::Finding>& findings) {
  auto out = Json::array();
  for (const auto& finding : findings)
    out.push_back({{"rule", finding.rule}, {"severity", shard::name(finding.severity)}, {"key", finding.key}, {"message", finding.message}});
  return out;
}

void print_findings(const std::vector<shard::Finding>& findings) {
  auto sorted = findings;
  std::stable_sort(sorted.begin(), sorted.end(), [](const auto& a, const auto& b) { return a.severity < b.severity; });
  for (const auto& finding : sorted) {
    const auto severity = std::string(shard::name(finding.severity));
    const auto style = !colour() ? fmt::text_style{} : fmt::fg(finding.severity == shard::Finding::Severity::Error ? fmt::terminal_color::red
                                                               : finding.severity == shard::Finding::Severity::Warning ? fmt::terminal_color::yellow : fmt::terminal_color::blue);
    fmt::print(style, "{}", severity);
    print_line(fmt::format("  {}  {}: {}", finding.rule, finding.key, finding.message));
  }
}

void print_table(const std::vector<std::vector<std::string>>& rows) {
  std::vector<std::size_t> width;
  for (const auto& row : rows)
    for (std::size_t c = 0; c < row.size(); ++c) {
      if (c == width.size()) width.push_back(0);
      width[c] = std::max(width[c], row[c].size());
    }
  const auto limit = terminal_width();
  for (const auto& row : rows) {
    std::string line;
    for (std::size_t c = 0; c < row.size(); ++c) {
      if (c) line += "  ";
      line += c + 1 < row.size() ? fmt::format("{:<{}}", row[c], width[c]) : row[c];
    }
    if (limit && line.size() > limit) line = line.substr(0, limit - 1) + ">";
    print_line(line);
  }
}

ProgressBar::ProgressBar(std::string what, bool quiet) : what_(std::move(what)), shown_(!quiet && isatty(STDERR_FILENO)) {}
ProgressBar::~ProgressBar() { clear(); }

shard::Progress ProgressBar::callback() {
  if (!shown_) return {};
  return [this](std::uint64_t done, std::uint64_t all) { draw(done, all); };
}

void ProgressBar::draw(std::uint64_t done, std::uint64_t all) {
  const std::unique_lock lock(mutex_, std::try_to_lock);
  const auto now = std::chrono::steady_clock::now();
  if (!lock || now - last_ < std::chrono::milliseconds(100)) return;
  last_ = now;
  const auto seconds = std::chrono::duration<double>(now - start_).count();
  const auto rate = seconds > 0 ? static_cast<double>(done) / seconds : 0.0;
  const auto part = all ? static_cast<double>(done) / static_cast<double>(all) : 1.0;
  const auto left = rate > 0 ? static_cast<double>(all - std::min(done, all)) / rate : 0.0;
  constexpr int kWidth = 24;
  const auto filled = static_cast<int>(part * kWidth);
  fmt::print(stderr, "\r\033[K{} [{:#<{}}{:.<{}}] {:3.0f} %  {} of {}  {}/s  {:.0f} s left", what_, "", filled, "", kWidth - filled, part * 100,
             human_bytes(done), human_bytes(all), human_bytes(static_cast<std::uint64_t>(rate)), left);
  std::fflush(stderr);
}

void ProgressBar::clear() {
  if (shown_ && last_.time_since_epoch().count()) fmt::print(stderr, "\r\033[K");
  last_ = {};
}

std::uint64_t peak_memory() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<std::uint64_t>(usage.ru_maxrss) * 1024;
}

}  // namespace cli
