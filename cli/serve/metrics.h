// Counters of a running server, as Prometheus text.
#pragma once

#include "cli/serve/history.h"

#include <array>
#include <chrono>
#include <map>
#include <mutex>
#include <string>

namespace cli {

class Metrics {
 public:
  void request(int http_status);
  void validation(const Record& record);
  /// A row that the disk did not take, or a command that could not be run.
  void trouble(const std::string& what);
  std::string text(std::size_t queued, bool running) const;

 private:
  mutable std::mutex mutex_;
  std::map<int, std::uint64_t> requests_;
  std::array<std::uint64_t, 5> validations_{};
  std::map<std::string, std::uint64_t> troubles_;
  double seconds_ = 0;
  struct Last {
    std::uint64_t at = 0;
    double loss = 0, seconds = 0;
  };
  std::map<std::string, Last> last_;  ///< by checkpoint, the newest only
  std::uint64_t clock_ = 0;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

}  // namespace cli
