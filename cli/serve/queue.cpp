// The worker survives whatever a checkpoint does to it short of ending the process.
#include "cli/serve/queue.h"

#include "libshard/error.h"

#include <fmt/format.h>

#include <algorithm>
#include <iterator>
#include <new>

namespace cli {
namespace {

const char* explain(Cut why) {
  switch (why) {
    case Cut::Timeout: return "the time for this request is over";
    case Cut::ClientGone: return "the client went away";
    default: return "the server stops";
  }
}

/// Nothing to remember.
Record never_begun(const Job& job) {
  Record record;
  record.checkpoint = job.shown;
  record.origin = job.origin;
  record.state = State::Interrupted;
  record.status = static_cast<int>(shard::Code::Io);
  record.error = explain(job.why);
  return record;
}

}  // namespace

void Job::cut(Cut reason) {
  auto none = Cut::No;
  why.compare_exchange_strong(none, reason);
  stop = true;
}

Queue::Queue(std::size_t longest, shard::Budget budget, std::unique_ptr<lm::Device> device, History& history, Metrics& metrics, std::function<void(const Record&)> after)
    : longest_(longest), budget_(budget), device_(std::move(device)), history_(history), metrics_(metrics), after_(std::move(after)), worker_([this] { work(); }) {}

Queue::~Queue() {
  close();
  worker_.join();
}

bool Queue::push(std::shared_ptr<Job> job) {
  const std::lock_guard lock(mutex_);
  if (closed_ || line_.size() >= longest_) return false;
  line_.push_back(std::move(job));
  wake_.notify_one();
  return true;
}

void Queue::tick() {
  std::deque<std::shared_ptr<Job>> leaving;
  {
    const std::lock_guard lock(mutex_);
    const auto now = std::chrono::steady_clock::now();
    const auto look = [&](Job& job) {
      if (closed_) job.cut(Cut::Shutdown);
      if (job.deadline && *job.deadline <= now) job.cut(Cut::Timeout);
    };
    if (current_) look(*current_);
    for (auto& job : line_) look(*job);
    const auto stay = std::stable_partition(line_.begin(), line_.end(), [](const auto& job) { return !job->stop; });
    leaving.assign(std::make_move_iterator(stay), std::make_move_iterator(line_.end()));
    line_.erase(stay, line_.end());
  }
  for (const auto& job : leaving) job->done(never_begun(*job));
}

void Queue::close() {
  {
    const std::lock_guard lock(mutex_);
    closed_ = true;
    wake_.notify_one();
  }
  tick();
}

bool Queue::wait(std::chrono::milliseconds most) {
  std::unique_lock lock(mutex_);
  return ended_.wait_for(lock, most, [&] { return worker_ended_; });
}

std::size_t Queue::length() const {
  const std::lock_guard lock(mutex_);
  return line_.size();
}

bool Queue::running() const {
  const std::lock_guard lock(mutex_);
  return current_ != nullptr;
}

void Queue::work() {
  std::unique_lock lock(mutex_);
  for (;;) {
    wake_.wait(lock, [&] { return closed_ || !line_.empty(); });
    if (line_.empty()) break;
    current_ = std::move(line_.front());
    line_.pop_front();
    const auto job = current_;
    lock.unlock();
    const auto record = run(*job);
    job->done(record);
    if (after_ && record.id) after_(record);
    lock.lock();
    current_ = nullptr;
  }
  worker_ended_ = true;
  ended_.notify_all();
}

Record Queue::run(Job& job) {
  Record record;
  record.checkpoint = job.shown;
  record.origin = job.origin;
  const auto end = [&](State state, shard::Code code, const std::string& error) {
    record.state = state;
    record.status = static_cast<int>(code);
    record.error = error;
  };
  if (job.stop) return never_begun(job);
  try {
    history_.begin(record, job.watched);
  } catch (const std::exception& error) {
    metrics_.trouble("history");
    end(State::Failed, shard::Code::Io, error.what());
    return record;
  }
  const auto start = std::chrono::steady_clock::now();
  try {
    auto budget = budget_;
    budget.stop = &job.stop;
    const auto validation = validate(job.ask, budget, *device_);
    record.state = validation.ok() ? State::Sound : State::Bad;
    record.status = validation.ok() ? 0 : 1;
    record.loss = validation.loss_true_vocab;
    record.answer = validation_json(validation).dump(-1, ' ', false, Json::error_handler_t::replace);
  } catch (const shard::Error& error) {
    end(State::Failed, error.code, error.what());
  } catch (const std::bad_alloc&) {
    end(State::Failed, shard::Code::Io, "memory: the input asks for more than there is");
  } catch (const std::exception& error) {
    end(State::Failed, shard::Code::Io, error.what());
  }
  if (record.state == State::Failed && job.stop) end(State::Interrupted, shard::Code::Io, explain(job.why));
  record.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  try {
    metrics_.validation(record);
    history_.finish(record, job.watched);
  } catch (const std::exception&) {
    metrics_.trouble("history");
  }
  return record;
}

}  // namespace cli
