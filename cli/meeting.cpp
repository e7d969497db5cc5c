// A rendezvous with this process's environment, signals and patience.
#include "cli/meeting.h"

#include "cli/markup.h"
#include "cli/options.h"
#include "cli/print.h"
#include "libshard/error.h"

#include <unistd.h>

#include <charconv>

namespace cli {
namespace {

using shard::Code;

std::chrono::milliseconds patience() {
  const auto all = environment();
  const auto found = all.find("SHARDKIT_TIMEOUT");
  if (found == all.end() || found->second.empty()) return std::chrono::seconds(60);
  const auto& text = found->second;
  unsigned seconds = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), seconds);
  shard::require(error == std::errc() && end == text.data() + text.size() && seconds > 0 && seconds <= 86'400, Code::Usage,
                 [&] { return fmt::format("SHARDKIT_TIMEOUT={}: should be seconds, from 1 to 86400", text); });
  return std::chrono::seconds(seconds);
}

void say_waiting(const std::string& what) { fmt::print(stderr, "shardkit: {}\n", one_line(what)); }

}  // namespace

ranks::Environment environment() {
  ranks::Environment out;
  for (char** at = environ; *at; ++at) {
    const std::string_view text = *at;
    const auto equals = text.find('=');
    if (equals != text.npos) out.emplace(text.substr(0, equals), text.substr(equals + 1));
  }
  return out;
}

Meeting::Meeting(const ranks::Launch& launch, const std::filesystem::path& near, bool quiet)
    : launch_(launch), ranks_(launch, ranks::place_of(environment(), launch, near), patience(), &stop_flag(), quiet ? ranks::Waiting() : say_waiting) {
  ranks_.on_failure(request_stop);
}

Meeting::~Meeting() {
  {
    const std::lock_guard lock(mutex_);
    left_ = true;
    changed_.notify_all();
  }
  if (watch_.joinable()) watch_.join();
}

int Meeting::run(const std::function<int()>& body) {
  try {
    return body();
  } catch (const shard::Error& error) {
    // A device's library may hear that a rank is gone before its connection here is seen to be closed.
    for (int i = 0; error.code == Code::Device && i < 100 && !ranks_.failed(); ++i) std::this_thread::sleep_for(std::chrono::milliseconds(10));
    if (!stopped_by()) ranks_.check();
    ranks_.fail(error);
    throw;
  } catch (const std::exception& error) {
    ranks_.fail({Code::Io, error.what()});
    throw;
  }
}

void Meeting::on_failure(std::function<void()> end, std::chrono::seconds grace) {
  ranks_.on_failure([this, end = std::move(end), grace] {
    request_stop();
    {
      const std::lock_guard lock(mutex_);
      if (left_) return;
      watch_ = std::thread([this, grace] { end_within(grace); });
    }
    end();
  });
}

void Meeting::end_within(std::chrono::seconds grace) {
  std::unique_lock lock(mutex_);
  if (changed_.wait_for(lock, grace, [&] { return left_; })) return;
  try {
    ranks_.check();
  } catch (const shard::Error& error) {
    print_error(error.what());
    ::_exit(static_cast<int>(error.code));
  }
}

}  // namespace cli
