// shardkit: parses the command line, runs one command, turns every failure into one line and a documented status.
#include "cli/commands.h"
#include "cli/options.h"
#include "cli/print.h"
#include "libshard/error.h"

#include <cstdio>
#include <new>

#include <sys/resource.h>

namespace {

/// A checkpoint of a thousand ranks is a thousand files.
void raise_open_file_limit() {
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur < limit.rlim_max) {
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
  }
}

int run(const cli::Action& action) {
  try {
    return action();
  } catch (const shard::Error& error) {
    if (cli::stopped_by()) {
      cli::print_error(fmt::format("stopped by signal {}; nothing is left under the final name", cli::stopped_by()));
      return 128 + cli::stopped_by();
    }
    cli::print_error(error.what());
    return static_cast<int>(error.code);
  } catch (const std::bad_alloc&) {
    cli::print_error("memory: the input asks for more than there is");
  } catch (const std::exception& error) {
    cli::print_error(error.what());
  }
  return static_cast<int>(shard::Code::Io);
}

}  // namespace

int main(int argc, char** argv) {
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
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) return app.exit(error);
    cli::print_error(fmt::format("command line: {}; 'shardkit --help' tells more", error.what()));
    return static_cast<int>(shard::Code::Usage);
  }
  raise_open_file_limit();
  cli::watch_signals();
  return run(action);
}
