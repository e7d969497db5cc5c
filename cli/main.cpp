// shardkit: parses the command line, runs one command, turns every failure into one line and a documented status.
#include "cli/commands.h"
#include "cli/options.h"
#include "cli/print.h"
#include "libshard/error.h"

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <iostream>
#include <new>
#include <system_error>

#include <fcntl.h>
#include <sys/resource.h>
#include <unistd.h>

namespace {

/// A checkpoint of a thousand ranks is a thousand files.
void raise_open_file_limit() {
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur < limit.rlim_max) {
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
  }
}

/// A standard descriptor that is closed would become a checkpoint's file, which results are then written to. Stands in for it: stdin and
/// stdout fail as a closed one does, stderr takes messages for nobody.
void hold_standard_descriptors() {
  constexpr int kModes[] = {O_WRONLY, O_RDONLY, O_RDWR};
  for (int fd = 0; fd < 3; ++fd)
    if (fcntl(fd, F_GETFD) < 0 && errno == EBADF) [[maybe_unused]] const int lowest = open("/dev/null", kModes[fd]);
}

/// An unset variable of a script arrives as "": no name of anything, and never the same as an option left out.
void refuse_empty(const CLI::App& app) {
  for (const auto* command : app.get_subcommands())
    for (const auto* option : command->get_options())
      for (const auto& text : option->results())
        shard::require(!text.empty(), shard::Code::Usage, [&] { return fmt::format("command line: {} is empty; should be a value, or left out", option->get_name()); });
}

/// A result that did not arrive is no result. A reader that took what it wanted and went (`| head`) is told nothing more.
int told(int status) {
  std::cout.flush();
  if (std::fflush(stdout) == 0 && !std::ferror(stdout)) return status;
  if (errno == EPIPE) return status;
  cli::print_error(fmt::format("stdout: cannot write: {}", std::strerror(errno)));
  return static_cast<int>(shard::Code::Io);
}

int run(const cli::Action& action) {
  try {
    return action();
  } catch (const shard::Error& error) {
    if (cli::stopped_by()) {
      cli::print_error(fmt::format("stopped by signal {}; {}", cli::stopped_by(), cli::said_when_stopped()));
      return 128 + cli::stopped_by();
    }
    cli::print_error(error.what());
    return static_cast<int>(error.code);
  } catch (const std::bad_alloc&) {
    cli::print_error("memory: the input asks for more than there is");
  } catch (const std::system_error& error) {
    if (!std::ferror(stdout)) cli::print_error(error.code() == std::errc::resource_unavailable_try_again ? fmt::format("threads: cannot be started: {}; the limit (ulimit -u, -v) should allow more", error.code().message()) : error.what());
    else if (error.code().value() == EPIPE) return 128 + SIGPIPE;
    errno = error.code().value();  // for told(), where fmt::print could not write
  } catch (const std::exception& error) {
    cli::print_error(error.what());
  }
  return static_cast<int>(shard::Code::Io);
}

/// CLI11 reads "010" as C does: 8. Here it is ten, as in iter_0000010.
void read_decimal(CLI::App& app) {
  for (auto* command : app.get_subcommands({}))
    for (auto* option : command->get_options())
      if (const auto type = option->get_type_name(); type.starts_with("INT") || type.starts_with("UINT"))
        option->transform([](std::string text) {
          const std::size_t sign = text.starts_with('-') || text.starts_with('+');
          const auto first = std::min(text.find_first_not_of('0', sign), text.size());
          const bool number = first == text.size() || std::isdigit(static_cast<unsigned char>(text[first]));
          return first > sign && number ? text.erase(sign, std::min(first, text.size() - 1) - sign) : text;
        });
}

}  // namespace

int main(int argc, char** argv) {
  hold_standard_descriptors();
  CLI::App app("Inspects, verifies, hashes, diffs, reshards and converts checkpoints of large language models.", "shardkit");
  app.set_version_flag("--version", "shardkit " SHARDKIT_VERSION);
  app.require_subcommand(1);
  app.failure_message(CLI::FailureMessage::simple);
  cli::Action action;
  cli::add_inspect(app, action);
  cli::add_convert(app, action);
  cli::add_verify(app, action);
  cli::add_hash(app, action);
  cli::add_diff(app, action);
  cli::add_families(app, action);
  cli::add_validate(app, action);
  cli::add_serve(app, action);
  cli::add_scan(app, action);
  read_decimal(app);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) return told(app.exit(error));
    cli::print_error(fmt::format("command line: {}; 'shardkit --help' tells more", error.what()));
    return static_cast<int>(shard::Code::Usage);
  }
  raise_open_file_limit();
  cli::watch_signals();
  return told(run([&] {
    refuse_empty(app);
    return action();
  }));
}
