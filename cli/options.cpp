// Reading shared options; signals only set a flag that the executor looks at.
#include "cli/options.h"

#include "cli/device.h"
#include "libshard/error.h"
#include "lm/mapped_file.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <csignal>
#include <limits>
#include <thread>

namespace cli {
namespace {

std::atomic<bool> stop = false;
volatile std::sig_atomic_t signal_number = 0;
std::string outcome_when_stopped = "nothing is left under the final name";

/// A file that is viewed became shorter: zeros take its place and whoever reads it says so at the end.
void on_lost_page(int number, siginfo_t* info, void*) {
  if (!lm::mend_mapping(info->si_addr)) std::signal(number, SIG_DFL);
}

void on_signal(int number) {
  signal_number = number;
  stop = true;
}

}  // namespace

// CLI11 takes what is too large for the largest number.
std::function<std::string(const std::string&)> at_least(std::int64_t low) {
  return [low](const std::string& text) {
    std::int64_t value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    return error == std::errc() && end == text.data() + text.size() && value >= low ? std::string() : fmt::format("'{}' is no whole number from {} to {}", text, low, std::numeric_limits<std::int64_t>::max());
  };
}

std::string tolerance_check(const std::string& text) {
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc() && end == text.data() + text.size() && std::isfinite(value) && value >= 0 ? std::string() : fmt::format("'{}' is no finite number from 0", text);
}

void check_dropped(const formats::OpenOptions& options, std::initializer_list<const formats::Checkpoint*> opened) {
  if (options.drop.empty()) return;
  for (const auto& pattern : options.drop) {
    const auto unmatched = [&](const auto* one) { return std::find(one->unmatched.begin(), one->unmatched.end(), pattern) != one->unmatched.end(); };
    shard::require(!std::all_of(opened.begin(), opened.end(), unmatched), shard::Code::Mismatch,
                   [&] { return fmt::format("--drop '{}': fits no tensor of {}; inspect lists stored keys, hash logical ones", pattern, (*opened.begin())->path.string()); });
  }
  shard::require(std::any_of(opened.begin(), opened.end(), [](const auto* one) { return !one->logical.tensors.empty(); }), shard::Code::Mismatch,
                 [&] { return fmt::format("--drop: leaves no tensor of {}", (*opened.begin())->path.string()); });
}

std::vector<std::string> vocabulary_notes(std::initializer_list<const formats::Checkpoint*> opened) {
  std::vector<std::string> out;
  for (const auto* one : opened)
    if (one->vocab && one->recorded_vocab && *one->vocab < *one->recorded_vocab)
      out.push_back(fmt::format("--vocab-size {}: {} records {} tokens; the last {} are not compared", *one->vocab, one->path.string(), *one->recorded_vocab, *one->recorded_vocab - *one->vocab));
  return out;
}

void ModelOptions::add_to(CLI::App& command) {
  command.add_option("--iteration", open.iteration, "Iteration of a Megatron run folder (default: the latest)")->check(at_least(0));
  command.add_option("--vocab-size", open.vocab, "True vocabulary size, where the checkpoint does not say it")->check(at_least(1));
  command.add_option("--family", open.family, "Hugging Face model family, over what config.json says (see shardkit families)")->type_name("NAME|FILE.json");
  command.add_option("--drop", open.drop, "Leave out tensors whose key fits GLOB")->type_name("GLOB");
  static constexpr std::pair<const char*, const char*> kSizes[] = {
      {"layers", "--num-layers"}, {"hidden", "--hidden-size"}, {"ffn", "--ffn-hidden-size"}, {"heads", "--num-attention-heads"},
      {"groups", "--num-query-groups"}, {"head", "--kv-channels"}, {"positions", "--max-position-embeddings"}, {"experts", "--num-experts"},
      {"expert_ffn", "--moe-ffn-hidden-size"}, {"vocab_multiple", "--make-vocab-size-divisible-by"}};
  for (const auto& [name, flag] : kSizes)
    command.add_option_function<std::int64_t>(flag, [this, key = std::string(name)](std::int64_t value) { open.parameters[key] = value; })
        ->check(at_least(name == std::string_view("vocab_multiple") ? 1 : 0))
        ->group("Model sizes that the checkpoint lacks");
  command.add_flag_callback("--swiglu", [this] { open.parameters["gated"] = 1; })->group("Model sizes that the checkpoint lacks");
}

void RunOptions::add_to(CLI::App& command) {
  command.add_option("--threads", threads, "Worker threads (default: all cores)");
  command.add_option("--mem-limit", memory, "Memory for buffers (default 256MiB)")->type_name("SIZE");
  command.add_option("--device", device, "auto, cpu, cuda (all of them) or cuda:N (default cpu)");
  command.add_option("--device-mem-limit", device_memory, "Memory to take on each device (default: a quarter of what is free, for validate nine tenths)")->type_name("SIZE");
  command.add_flag("-q,--quiet", quiet, "No progress, no summary");
  command.add_flag("-v,--verbose", verbose, "Say more");
  command.add_flag("--json", json, "One JSON object on stdout");
}

shard::Budget RunOptions::budget() const {
  require_cpu(device);
  return limits();
}

shard::Budget RunOptions::limits() const {
  const auto cores = std::max(1u, std::thread::hardware_concurrency());
  shard::require(threads <= 4096, shard::Code::Usage, [&] { return fmt::format("--threads {}: should be at most 4096", threads); });
  device_limit();  // a size that is none is refused wherever the work is done
  return {threads ? threads : cores, parse_size(memory, "--mem-limit"), &stop};
}

std::uint64_t RunOptions::device_limit() const { return device_memory.empty() ? 0 : parse_size(device_memory, "--device-mem-limit"); }

std::uint64_t parse_size(const std::string& text, std::string_view flag) {
  static const std::map<std::string, std::uint64_t> units{{"", 1}, {"B", 1}, {"KB", 1'000}, {"MB", 1'000'000}, {"GB", 1'000'000'000},
      {"TB", 1'000'000'000'000}, {"K", 1ull << 10}, {"M", 1ull << 20}, {"G", 1ull << 30}, {"T", 1ull << 40},
      {"KIB", 1ull << 10}, {"MIB", 1ull << 20}, {"GIB", 1ull << 30}, {"TIB", 1ull << 40}};
  std::size_t digits = 0;
  while (digits < text.size() && (std::isdigit(static_cast<unsigned char>(text[digits])) || text[digits] == '.')) ++digits;
  std::string unit;
  for (auto i = digits; i < text.size(); ++i)
    if (text[i] != ' ') unit += static_cast<char>(std::toupper(static_cast<unsigned char>(text[i])));
  const auto found = units.find(unit);
  double number = 0;
  try {
    std::size_t read = 0;
    number = digits && digits < 20 ? std::stod(text.substr(0, digits), &read) : 0;
    if (read != digits) number = 0;  // "1.2.3"
  } catch (const std::exception&) {
  }
  shard::require(found != units.end() && number > 0 && number * static_cast<double>(found->second) < 9e18, shard::Code::Usage,
                 [&] { return fmt::format("{}: '{}' is no size; 5GB, 512MiB or bytes are", flag, text); });
  return static_cast<std::uint64_t>(number * static_cast<double>(found->second));
}

const std::atomic<bool>& stop_flag() { return stop; }
int stopped_by() { return signal_number; }
void say_when_stopped(std::string what) { outcome_when_stopped = std::move(what); }
const std::string& said_when_stopped() { return outcome_when_stopped; }
void request_stop() { stop = true; }

void watch_signals() {
  struct sigaction torn {};
  torn.sa_sigaction = on_lost_page;
  torn.sa_flags = SA_SIGINFO;
  sigaction(SIGBUS, &torn, nullptr);
  for (const int number : {SIGINT, SIGTERM, SIGHUP})
    if (std::signal(number, on_signal) == SIG_IGN) std::signal(number, SIG_IGN);  // nohup's, or a shell's for what runs in the background
  // A reader that went away, a limit on the size of files: the write that fails says so.
  for (const int number : {SIGPIPE, SIGXFSZ}) std::signal(number, SIG_IGN);
}

}  // namespace cli
