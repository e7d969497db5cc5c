// Labels come from requests, so their number is capped: the checkpoint judged longest ago makes room.
#include "cli/serve/metrics.h"

#include "cli/markup.h"
#include "cli/print.h"

#include <fmt/format.h>

#include <algorithm>

namespace cli {
namespace {

constexpr std::size_t kCheckpoints = 100;

std::string label(const std::string& text) {
  std::string out;
  for (const char c : printable(text)) {
    if (c == '\\' || c == '"') out += '\\';
    if (c == '\n') out += "\\n";
    else out += c;
  }
  return out;
}

}  // namespace

void Metrics::request(int http_status) {
  const std::lock_guard lock(mutex_);
  ++requests_[http_status];
}

void Metrics::validation(const Record& record) {
  const std::lock_guard lock(mutex_);
  ++validations_[static_cast<std::size_t>(record.state)];
  seconds_ += record.seconds;
  if (!record.loss) return;
  last_[record.checkpoint] = {++clock_, *record.loss, record.seconds};
  if (last_.size() > kCheckpoints) last_.erase(std::min_element(last_.begin(), last_.end(), [](const auto& a, const auto& b) { return a.second.at < b.second.at; }));
}

void Metrics::trouble(const std::string& what) {
  const std::lock_guard lock(mutex_);
  ++troubles_[what];
}

std::string Metrics::text(std::size_t queued, bool running) const {
  const std::lock_guard lock(mutex_);
  std::string out;
  const auto head = [&](const char* name, const char* type, const char* help) { out += fmt::format("# HELP shardkit_{0} {2}\n# TYPE shardkit_{0} {1}\n", name, type, help); };
  head("requests_total", "counter", "HTTP requests answered, by status.");
  for (const auto& [status, count] : requests_) out += fmt::format("shardkit_requests_total{{status=\"{}\"}} {}\n", status, count);
  head("validations_total", "counter", "Validations ended, by outcome.");
  for (std::size_t i = 1; i < validations_.size(); ++i) out += fmt::format("shardkit_validations_total{{outcome=\"{}\"}} {}\n", name(static_cast<State>(i)), validations_[i]);
  head("validation_seconds_total", "counter", "Time spent in validations.");
  out += fmt::format("shardkit_validation_seconds_total {}\n", seconds_);
  head("queue_length", "gauge", "Validations that wait.");
  out += fmt::format("shardkit_queue_length {}\n", queued);
  head("running", "gauge", "Validations under way.");
  out += fmt::format("shardkit_running {}\n", running ? 1 : 0);
  head("last_loss", "gauge", "Mean loss over the true vocabulary at the last validation of a checkpoint.");
  for (const auto& [path, last] : last_) out += fmt::format("shardkit_last_loss{{checkpoint=\"{}\"}} {}\n", label(path), last.loss);
  head("last_seconds", "gauge", "Time that the last validation of a checkpoint took.");
  for (const auto& [path, last] : last_) out += fmt::format("shardkit_last_seconds{{checkpoint=\"{}\"}} {}\n", label(path), last.seconds);
  head("trouble_total", "counter", "What went wrong beside validations.");
  for (const auto& [what, count] : troubles_) out += fmt::format("shardkit_trouble_total{{what=\"{}\"}} {}\n", label(what), count);
  head("peak_memory_bytes", "gauge", "Highest resident set so far.");
  out += fmt::format("shardkit_peak_memory_bytes {}\n", peak_memory());
  head("uptime_seconds", "gauge", "Time since the server began.");
  out += fmt::format("shardkit_uptime_seconds {:.3f}\n", std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count());
  return out;
}

}  // namespace cli
