// stdin is an unnamed file, not a pipe: a command that never reads it cannot block the server.
#include "cli/serve/on_bad.h"

#include "cli/serve/page.h"

#include <fmt/format.h>

#include <chrono>
#include <csignal>
#include <cstring>
#include <thread>
#include <vector>

#include <fcntl.h>
#include <spawn.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

namespace cli {
namespace {

constexpr auto kLongest = std::chrono::seconds(60);

}  // namespace

std::string run_on_bad(const std::string& command, const Record& record, const std::atomic<bool>& stop) {
  const auto text = record_json(record, true).dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
  const int in = memfd_create("shardkit-verdict", MFD_CLOEXEC);
  if (in < 0) return fmt::format("--on-bad: {}", std::strerror(errno));
  const bool written = write(in, text.data(), text.size()) == static_cast<ssize_t>(text.size()) && lseek(in, 0, SEEK_SET) == 0;

  std::vector<std::string> variables;
  for (char** at = environ; *at; ++at)
    if (std::strncmp(*at, "SHARDKIT_", 9) != 0) variables.emplace_back(*at);  // the token among them
  variables.push_back(fmt::format("SHARDKIT_VERDICT={}", name(record.state)));
  variables.push_back("SHARDKIT_CHECKPOINT=" + record.checkpoint);
  variables.push_back(fmt::format("SHARDKIT_STATUS={}", record.status));
  variables.push_back(record.loss ? fmt::format("SHARDKIT_LOSS={}", *record.loss) : "SHARDKIT_LOSS=");
  std::vector<char*> environment, arguments;
  for (auto& variable : variables) environment.push_back(variable.data());
  environment.push_back(nullptr);
  std::string words[] = {"sh", "-c", command};
  for (auto& word : words) arguments.push_back(word.data());
  arguments.push_back(nullptr);

  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, in, STDIN_FILENO);
  posix_spawn_file_actions_adddup2(&actions, STDERR_FILENO, STDOUT_FILENO);  // stdout is the server's own
  posix_spawnattr_t attributes;
  posix_spawnattr_init(&attributes);
  sigset_t defaults;
  sigemptyset(&defaults);
  for (const int number : {SIGPIPE, SIGXFSZ, SIGINT, SIGTERM, SIGHUP}) sigaddset(&defaults, number);
  posix_spawnattr_setsigdefault(&attributes, &defaults);
  posix_spawnattr_setpgroup(&attributes, 0);
  posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETPGROUP);
  pid_t child = -1;
  const int failed = written ? posix_spawn(&child, "/bin/sh", &actions, &attributes, arguments.data(), environment.data()) : EIO;
  posix_spawn_file_actions_destroy(&actions);
  posix_spawnattr_destroy(&attributes);
  close(in);
  if (failed) return fmt::format("--on-bad: {}", std::strerror(failed));

  const auto end = std::chrono::steady_clock::now() + kLongest;
  int status = 0;
  for (;;) {
    if (waitpid(child, &status, WNOHANG) == child) break;
    if (stop || std::chrono::steady_clock::now() > end) {
      kill(-child, SIGKILL);
      waitpid(child, &status, 0);
      return stop ? "--on-bad: the command was killed: the server stops" : "--on-bad: the command did not end in time and was killed";
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
  if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return "";
  return fmt::format("--on-bad: the command ended with status {}", WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
}

}  // namespace cli
