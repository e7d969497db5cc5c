// What people see: sizes, tables, progress, findings.
#pragma once

#include "libshard/execute.h"
#include "libshard/layout.h"
#include "libshard/state_dict.h"

#include <nlohmann/json.hpp>

#include <chrono>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

namespace cli {

using Json = nlohmann::ordered_json;

std::string human_bytes(std::uint64_t bytes);
std::string human_count(std::uint64_t count);
/// "TP 2, PP 2, VPP 2"
std::string layout_line(const shard::Parallel& parallel);
Json layout_json(const std::optional<shard::Parallel>& parallel);
/// One line on stderr, whatever a file's own text put into the message.
void print_error(std::string_view text);
/// One line on stdout, whatever keys and paths put into it.
void print_line(std::string_view text);
/// One object on stdout, with text that is no UTF-8 replaced.
void print_json(const Json& json);
/// One line a finding, errors first.
void print_findings(const std::vector<shard::Finding>& findings);
Json findings_json(const std::vector<shard::Finding>& findings);
/// Columns as wide as they must be; the last may be cut to the terminal's width.
void print_table(const std::vector<std::vector<std::string>>& rows);

/// A bar on stderr, only where it is a terminal.
class ProgressBar {
 public:
  explicit ProgressBar(std::string what, bool quiet);
  ~ProgressBar();
  shard::Progress callback();
  void clear();

 private:
  void draw(std::uint64_t done, std::uint64_t all);
  std::string what_;
  bool shown_;
  std::mutex mutex_;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now(), last_{};
};

/// Highest resident set of this process so far, in bytes.
std::uint64_t peak_memory();

}  // namespace cli
