// Options that several commands share.
#pragma once

#include "formats/checkpoint.h"
#include "libshard/execute.h"

#include <CLI/CLI.hpp>

#include <functional>
#include <initializer_list>
#include <string>
#include <string_view>

namespace cli {

/// --iteration, --vocab-size, --drop, and the model's sizes by hand.
struct ModelOptions {
  formats::OpenOptions open;
  void add_to(CLI::App& command);
};

/// --threads, --mem-limit, --device, --device-mem-limit, -q, -v, --json.
struct RunOptions {
  unsigned threads = 0;
  std::string memory = "256MiB", device = "cpu", device_memory;
  bool quiet = false, verbose = false, json = false;
  void add_to(CLI::App& command);
  /// Threads, memory and the stop flag that signals set. Throws Usage for sizes that are none.
  shard::Budget limits() const;
  /// Bytes that buffers may take on a device; 0: a share of what is free.
  std::uint64_t device_limit() const;
  /// The same for commands that only the CPU runs: throws Device where another device is asked for.
  shard::Budget budget() const;
};

/// "5GB" (10^9), "5GiB" (2^30), or bytes. Throws Usage, which names the flag.
std::uint64_t parse_size(const std::string& text, std::string_view flag);

/// Refuses what is no whole number from `low` on.
std::function<std::string(const std::string&)> at_least(std::int64_t low);
/// Refuses what is no finite number from 0 on.
std::string tolerance_check(const std::string& text);

/// A pattern of --drop that fits nothing in any of these checkpoints is refused (Mismatch), and so is one that leaves no tensor.
void check_dropped(const formats::OpenOptions& options, std::initializer_list<const formats::Checkpoint*> opened);
/// Where --vocab-size leaves tokens out of a comparison that a checkpoint records.
std::vector<std::string> vocabulary_notes(std::initializer_list<const formats::Checkpoint*> opened);

/// Set by SIGINT, SIGTERM, SIGHUP; the signal's number.
const std::atomic<bool>& stop_flag();
int stopped_by();
/// What the message of a stopped process says of its output, from now on; at first that nothing is left.
void say_when_stopped(std::string what);
const std::string& said_when_stopped();
/// As a signal does, but stopped_by() stays 0.
void request_stop();
void watch_signals();

}  // namespace cli
