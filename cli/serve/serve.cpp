// shardkit serve: wires listener, queue, watcher and history together, and decides how it starts and ends.
#include "cli/commands.h"
#include "cli/markup.h"
#include "cli/model_device.h"
#include "cli/options.h"
#include "cli/serve/history.h"
#include "cli/serve/http.h"
#include "cli/serve/metrics.h"
#include "cli/serve/on_bad.h"
#include "cli/serve/page.h"
#include "cli/serve/queue.h"
#include "cli/serve/request.h"
#include "cli/serve/watch.h"
#include "libshard/error.h"

#include <cerrno>
#include <charconv>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>

#include <unistd.h>

namespace cli {
namespace {

namespace fs = std::filesystem;
using shard::Code;

constexpr int kGraceSeconds = 10;
constexpr std::int64_t kPageRows = 200, kHistoryRows = 1000;

struct ServeAsk {
  std::string listen = "127.0.0.1:0", root, watch, history, token, on_bad;
  double every = 10, timeout = 3600;
  unsigned queue = 16;
  std::int64_t keep = 10'000;
  ValidateAsk watched;  ///< what validations of --watch compare with
  RunOptions run;
};

/// Where state that should outlive a restart belongs.
fs::path default_history() {
  if (const char* state = std::getenv("XDG_STATE_HOME"); state && *state == '/') return fs::path(state) / "shardkit/history.sqlite";
  const char* home = std::getenv("HOME");
  shard::require(home && *home == '/', Code::Usage, [] { return "--history: there is no home folder to put it; should be given"; });
  return fs::path(home) / ".local/state/shardkit/history.sqlite";
}

HttpReply json_reply(int status, const Json& body) { return {status, "application/json", body.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n", {}}; }
HttpReply refusal(int http, int status, const std::string& error) { return json_reply(http, Json{{"error", one_line(error)}, {"status", status}}); }

int http_status(const Record& record) {
  switch (static_cast<Code>(record.status)) {
    case Code::Usage: return 400;
    case Code::NotFound: return 404;
    case Code::BadFormat:
    case Code::BadLayout:
    case Code::Mismatch: return 422;
    default: return 500;
  }
}

/// What each path answers.
class Routes {
 public:
  Routes(fs::path root, double timeout, Queue& queue, History& history, Metrics& metrics) : root_(std::move(root)), timeout_(timeout), queue_(queue), history_(history), metrics_(metrics) {}

  void operator()(const HttpRequest& request, const std::shared_ptr<Pending>& pending) {
    try {
      if (request.path == "/validate") validate_later(request, pending);
      else pending->answer(read_only(request));
    } catch (const Refusal& error) {
      pending->answer(refusal(error.http_status, error.status, error.error));
    } catch (const std::exception& error) {
      pending->answer(refusal(500, static_cast<int>(Code::Io), error.what()));
    }
  }

 private:
  HttpReply read_only(const HttpRequest& request) {
    const bool known = request.path == "/" || request.path == "/health" || request.path == "/metrics" || request.path == "/history" || request.path.starts_with("/history/");
    if (!known) return refusal(404, static_cast<int>(Code::NotFound), "request: there is /, /health, /metrics, /history, /history/ID and POST /validate");
    if (request.method != "GET" && request.method != "HEAD") {
      auto reply = refusal(405, static_cast<int>(Code::Usage), "request: should be GET");
      reply.headers.emplace_back("Allow", "GET, HEAD");
      return reply;
    }
    if (request.path == "/health") return json_reply(200, Json{{"status", "ok"}, {"version", SHARDKIT_VERSION}, {"queued", queue_.length()}, {"running", queue_.running()}});
    if (request.path == "/metrics") return {200, "text/plain; version=0.0.4; charset=utf-8", metrics_.text(queue_.length(), queue_.running()), {}};
    if (request.path == "/")
      return {200, "text/html; charset=utf-8", history_page(history_.latest(kPageRows, true), root_.string(), queue_.length(), queue_.running()),
              {{"Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"}}};
    if (request.path == "/history") {
      auto out = Json::array();
      for (const auto& record : history_.latest(kHistoryRows, false)) out.push_back(record_json(record, false));
      return json_reply(200, out);
    }
    const auto text = request.path.substr(sizeof "/history/" - 1);
    std::int64_t id = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), id);
    const auto record = error == std::errc() && end == text.data() + text.size() ? history_.find(id) : std::nullopt;
    if (!record) return refusal(404, static_cast<int>(Code::NotFound), "history: no such validation");
    return json_reply(200, record_json(*record, true));
  }

  void validate_later(const HttpRequest& request, const std::shared_ptr<Pending>& pending) {
    if (request.method != "POST") {
      auto reply = refusal(405, static_cast<int>(Code::Usage), "request: /validate should be POST");
      reply.headers.emplace_back("Allow", "POST");
      return pending->answer(std::move(reply));
    }
    auto job = std::make_shared<Job>();
    job->ask = read_ask(root_, request.body);
    job->shown = job->ask.path;
    job->origin = "request";
    if (timeout_ > 0) job->deadline = std::chrono::steady_clock::now() + std::chrono::duration_cast<std::chrono::steady_clock::duration>(std::chrono::duration<double>(timeout_));
    job->done = [pending, job = job.get()](const Record& record) { pending->answer(reply_of(record, job->why)); };
    pending->on_gone = [weak = std::weak_ptr(job)] {
      if (const auto job = weak.lock()) job->cut(Cut::ClientGone);
    };
    if (queue_.push(std::move(job))) return;
    auto reply = refusal(503, static_cast<int>(Code::Io), "the server is busy; try again later");
    reply.headers.emplace_back("Retry-After", "5");
    pending->answer(std::move(reply));
  }

  static HttpReply reply_of(const Record& record, Cut why) {
    HttpReply reply;
    if (record.state == State::Sound || record.state == State::Bad) reply = {200, "application/json", record.answer + "\n", {}};
    else if (record.state == State::Interrupted) reply = refusal(why == Cut::Timeout ? 504 : 503, record.status, record.error);
    else reply = refusal(http_status(record), record.status, in_words_of_a_request(record.error));
    if (record.id) reply.headers.emplace_back("Content-Location", fmt::format("/history/{}", record.id));
    return reply;
  }

  const fs::path root_;
  const double timeout_;
  Queue& queue_;
  History& history_;
  Metrics& metrics_;
};

fs::path existing_folder(const std::string& flag, const std::string& text) {
  std::error_code error;
  const auto path = fs::canonical(text, error);
  shard::require(!error && fs::is_directory(path), Code::NotFound, [&] { return fmt::format("{} {}: is no folder", flag, text); });
  return path;
}

/// What no checkpoint could be judged by would make an error of each, and call --on-bad.
void check_watched(const ValidateAsk& ask) {
  check_ask(ask);
  shard::require(ask.tp >= 1 && ask.tp <= 64 && ask.pp >= 1 && ask.pp <= 64, Code::Usage, [&] { return fmt::format("--tp {} --pp {}: should be 1 to 64", ask.tp, ask.pp); });
  shard::require(!ask.max_loss || std::isfinite(*ask.max_loss), Code::Usage, [&] { return fmt::format("--max-loss {}: should be a number", *ask.max_loss); });
  if (!ask.tokens.empty()) read_tokens(ask.tokens);
  if (!ask.text.empty()) formats::File(ask.text);
  if (ask.reference.empty()) return;
  const auto inputs = read_arrays(ask.reference, [](const std::string& name) { return name == "input_ids" || name == "labels"; });
  for (const char* name : {"input_ids", "labels"})
    shard::require(inputs.find(name) != nullptr, Code::BadFormat, [&] { return fmt::format("{}: should hold {} [b,s]", ask.reference, name); });
}

int run(ServeAsk ask) {
  HttpOptions http;
  http.listen = ListenAddress::parse(ask.listen);
  if (const char* token = std::getenv("SHARDKIT_TOKEN"); ask.token.empty() && token) ask.token = token;
  shard::require(http.listen.loopback || !ask.token.empty(), Code::Usage, [&] { return fmt::format("--listen {}: can be reached from other machines; should have --token or SHARDKIT_TOKEN", ask.listen); });
  shard::require(ask.queue >= 1 && ask.queue <= 10'000 && ask.keep >= 1 && ask.every >= 0.05 && ask.every <= 86'400 && ask.timeout >= 0 && ask.timeout <= 1e7, Code::Usage,
                 [] { return "command line: should be --queue 1 to 10000, --keep 1 or more, --every 0.05 to 86400, --timeout 0 to 10000000"; });
  http.token = ask.token;
  http.refuse = [](int status, const std::string& error) { return refusal(status, static_cast<int>(status == 500 ? Code::Io : Code::Usage), error); };

  const auto watch_folder = ask.watch.empty() ? fs::path() : existing_folder("--watch", ask.watch);
  const auto root = existing_folder("--root", !ask.root.empty() ? ask.root : !ask.watch.empty() ? ask.watch : ".");
  auto watched = ask.watched;
  check_watched(watched);
  for (auto* file : {&watched.reference, &watched.tokens, &watched.text})
    if (!file->empty()) *file = fs::absolute(*file).string();
  History history(fs::absolute(ask.history.empty() ? default_history() : fs::path(ask.history)), ask.keep);
  // Paths in requests, messages and rows are then short, and tell nobody where the root lies.
  shard::require(::chdir(root.c_str()) == 0, Code::Io, [&] { return fmt::format("--root {}: cannot be entered", root.string()); });

  Metrics metrics;
  http.sent = [&](int status) { metrics.request(status); };
  const auto note = [&](const std::string& text) {
    if (!ask.run.quiet) fmt::print(stderr, "shardkit: serve: {}\n", one_line(text));
  };
  const auto after = [&](const Record& record) {
    if (ask.run.verbose || (record.origin == "watch" && record.state != State::Sound)) note(fmt::format("{}: {}{}", record.checkpoint, name(record.state), record.error.empty() ? "" : ": " + record.error));
    // A request's own mistake is told to whoever asked; of a watched checkpoint nobody else would hear.
    const bool bad = record.state == State::Bad || (record.state == State::Failed && record.origin == "watch");
    if (ask.on_bad.empty() || !bad) return;
    const auto trouble = run_on_bad(ask.on_bad, record, stop_flag());
    if (trouble.empty()) return;
    metrics.trouble("on_bad");
    note(trouble);
  };
  auto where = model_device(ask.run, ask.watched.choice);
  if (ask.run.device != "cpu") note(fmt::format("on {} ({})", where.device->name(), where.why));
  Queue queue(ask.queue, ask.run.limits(), std::move(where.device), history, metrics, after);
  HttpServer server(http, Routes(root, ask.timeout, queue, history, metrics));

  std::unique_ptr<Watch> watch;
  const auto submit = [&](const Candidate& candidate) {
    auto job = std::make_shared<Job>();
    job->ask = watched;
    const auto relative = candidate.path.lexically_relative(root);
    job->ask.path = job->shown = relative.empty() || *relative.begin() == ".." ? candidate.path.string() : relative.string();
    job->origin = "watch";
    job->watched = Watched{candidate.path.string(), candidate.stamp};
    job->done = [&watch, path = candidate.path](const Record&) { watch->ended(path); };
    return queue.push(std::move(job));
  };

  fmt::print("{}\n", server.url());
  shard::require(std::fflush(stdout) == 0, Code::Io, [&] { return fmt::format("stdout: cannot write the URL: {}", std::strerror(errno)); });
  if (!watch_folder.empty()) {
    watch = std::make_unique<Watch>(watch_folder, std::chrono::milliseconds(static_cast<long>(ask.every * 1000)), history, submit);
    watch->start();  // not before `watch` holds it: what it submits ends there
  }
  server.run(stop_flag(), [&] { queue.close(); }, [&] { queue.tick(); }, kGraceSeconds);

  queue.close();
  const int signal = stopped_by();
  const int status = signal == SIGTERM ? 0 : 128 + signal;
  const bool ended = queue.wait(std::chrono::seconds(kGraceSeconds));
  if (!ended || (watch && !watch->stop(std::chrono::seconds(1)))) {
    // Stuck in a read that does not return, as on a dead network file system: threads cannot be ended, the process can.
    history.interrupt_running();
    note(ended ? "looking at --watch did not stop in time" : "a validation did not stop in time and is left as interrupted");
    std::fflush(nullptr);
    ::_exit(status);
  }
  return status;
}

}  // namespace

void add_serve(CLI::App& app, Action& action) {
  auto ask = std::make_shared<ServeAsk>();
  auto* command = app.add_subcommand("serve", "Stay resident and validate what is asked for by HTTP, or what lands in a folder");
  command->add_option("--listen", ask->listen, "IP address and port; port 0 picks one (default 127.0.0.1:0); the URL is printed on stdout")->type_name("ADDR:PORT");
  command->add_option("--token", ask->token, "Asked for as 'Authorization: Bearer'; needed off loopback (better in SHARDKIT_TOKEN: ps shows arguments)");
  command->add_option("--root", ask->root, "Only paths in it are served (default: --watch's, or the working folder)")->type_name("DIR");
  auto* watch = command->add_option("--watch", ask->watch, "Validate each new complete checkpoint in it")->type_name("DIR");
  command->add_option("--every", ask->every, "Seconds between two looks at --watch (default 10)")->needs(watch);
  command->add_option("--history", ask->history, "SQLite file (default $XDG_STATE_HOME/shardkit/history.sqlite)")->type_name("FILE");
  command->add_option("--keep", ask->keep, "Validations that the history keeps (default 10000)");
  command->add_option("--on-bad", ask->on_bad, "Command for /bin/sh after a bad verdict: JSON on stdin, SHARDKIT_VERDICT and SHARDKIT_CHECKPOINT in the environment")->type_name("COMMAND");
  command->add_option("--queue", ask->queue, "Requests that may wait (default 16); more are answered 503");
  command->add_option("--timeout", ask->timeout, "Seconds that a request may take, waiting included; 0: no limit (default 3600)");
  command->add_option("--reference", ask->watched.reference, "For --watch: inputs with the values that should come out")->type_name("FILE")->needs(watch);
  command->add_option("--tokens", ask->watched.tokens, "For --watch: token ids")->type_name("FILE")->needs(watch);
  command->add_option("--text", ask->watched.text, "For --watch: text for the checkpoint's own tokenizer")->type_name("FILE")->needs(watch);
  command->add_option("--max-loss", ask->watched.max_loss, "For --watch: bad above this mean loss")->needs(watch);
  command->add_option("--compute", ask->watched.compute, "For --watch: f32, bf16 or fp8 (default f32)")->needs(watch);
  ask->watched.choice.add_to(*command);
  command->add_option("--tp", ask->watched.tp, "For --watch: tensor parallel ranks, as threads (default 1)")->needs(watch);
  command->add_option("--pp", ask->watched.pp, "For --watch: pipeline stages, as threads (default 1)")->needs(watch);
  ask->run.add_to(*command);
  command->callback([ask, &action] { action = [ask] { return run(*ask); }; });
}

}  // namespace cli
