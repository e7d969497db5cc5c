// Polling, since checkpoints land on network file systems where inotify sees nothing.
#include "cli/serve/watch.h"

#include "formats/checkpoint.h"
#include "formats/file.h"

#include <fmt/format.h>

#include <algorithm>
#include <cctype>
#include <charconv>

#include <sys/stat.h>

namespace cli {
namespace {

namespace fs = std::filesystem;

constexpr const char* kTracker = "latest_checkpointed_iteration.txt";
constexpr std::size_t kMostFiles = 200'000;
constexpr int kTrackedPolls = 2, kUntrackedPolls = 4;

/// The iteration behind "iter_0000010".
std::optional<std::int64_t> iteration_of(const std::string& name) {
  if (!name.starts_with("iter_")) return std::nullopt;
  std::int64_t out = 0;
  const auto [end, error] = std::from_chars(name.data() + 5, name.data() + name.size(), out);
  return error == std::errc() && end == name.data() + name.size() && out >= 0 ? std::optional(out) : std::nullopt;
}

struct Tracker {
  bool there = false, release = false;
  std::int64_t latest = -1;
};

Tracker read_tracker(const fs::path& folder) {
  Tracker out;
  std::error_code error;
  out.there = fs::exists(folder / kTracker, error);
  std::string text;
  try {
    text = formats::read_text(folder / kTracker, 100);
  } catch (const std::exception&) {  // none, or no file of that kind
  }
  const auto space = [](unsigned char c) { return std::isspace(c) != 0; };
  text.erase(text.begin(), std::find_if_not(text.begin(), text.end(), space));
  text.erase(std::find_if(text.begin(), text.end(), space), text.end());
  out.release = text == "release";
  // Megatron writes the tracker in place; a torn number reads as an earlier iteration, which is complete all the same.
  const auto [end, problem] = std::from_chars(text.data(), text.data() + text.size(), out.latest);
  if (problem != std::errc() || end != text.data() + text.size()) out.latest = -1;
  return out;
}

/// nullopt for a folder that vanished meanwhile or has too many files.
std::optional<std::string> stamp_of(const fs::path& folder) {
  std::vector<std::string> files;
  std::error_code error;
  for (fs::recursive_directory_iterator at(folder, fs::directory_options::none, error), end; !error && at != end; at.increment(error)) {
    struct stat info {};
    if (::stat(at->path().c_str(), &info) != 0 || S_ISDIR(info.st_mode)) continue;
    files.push_back(fmt::format("{} {} {}.{:09} {}\n", at->path().lexically_relative(folder).string(), info.st_size, info.st_mtim.tv_sec, info.st_mtim.tv_nsec, info.st_ino));
    if (files.size() > kMostFiles) return std::nullopt;
  }
  if (error || files.empty()) return std::nullopt;
  std::sort(files.begin(), files.end());
  // FNV-1a: only to see that something changed.
  std::uint64_t hash = 0xcbf29ce484222325ull;
  for (const auto& file : files)
    for (const char c : file) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3ull;
  return fmt::format("{} files {:016x}", files.size(), hash);
}

bool looks_like_checkpoint(const fs::path& folder) {
  std::error_code error;
  return fs::exists(folder / ".metadata", error) || fs::exists(folder / "config.json", error);
}

std::vector<fs::path> subfolders(const fs::path& folder) {
  std::vector<fs::path> out;
  std::error_code error;
  for (fs::directory_iterator at(folder, error), end; !error && at != end; at.increment(error))
    if (!at->path().filename().string().starts_with(".") && at->symlink_status(error).type() == fs::file_type::directory) out.push_back(at->path());
  std::sort(out.begin(), out.end());
  return out;
}

void add(std::vector<Candidate>& out, const fs::path& folder, bool tracked) {
  if (auto stamp = stamp_of(folder)) out.push_back({folder, std::move(*stamp), tracked});
}

void look(std::vector<Candidate>& out, const fs::path& folder, const std::vector<fs::path>& below) {
  const auto tracker = read_tracker(folder);
  for (const auto& one : below) {
    const auto name = one.filename().string();
    if (const auto iteration = iteration_of(name); iteration && *iteration <= tracker.latest) add(out, one, true);
    if (name == "release" && tracker.release) add(out, one, true);
  }
  if (!tracker.there && !iteration_of(folder.filename().string()) && looks_like_checkpoint(folder)) add(out, folder, false);
}

}  // namespace

std::vector<Candidate> candidates(const fs::path& folder) {
  std::vector<Candidate> out;
  const auto below = subfolders(folder);
  look(out, folder, below);
  for (const auto& one : below)
    // What belongs to a run folder itself was looked at above.
    if (const auto name = one.filename().string(); !iteration_of(name) && !(name == "release" && read_tracker(folder).there)) look(out, one, subfolders(one));
  // Oldest iterations first, as they were written.
  std::stable_sort(out.begin(), out.end(), [](const Candidate& a, const Candidate& b) {
    const auto key = [](const Candidate& c) { return std::pair(c.path.parent_path(), iteration_of(c.path.filename().string()).value_or(-1)); };
    return key(a) < key(b);
  });
  return out;
}

Watch::Watch(fs::path folder, std::chrono::milliseconds every, History& history, std::function<bool(const Candidate&)> submit)
    : folder_(std::move(folder)), every_(every), history_(history), submit_(std::move(submit)) {}

Watch::~Watch() {
  stop(std::chrono::milliseconds(0));
  if (thread_.joinable()) thread_.join();
}

bool Watch::stop(std::chrono::milliseconds most) {
  std::unique_lock lock(mutex_);
  quit_ = true;
  wake_.notify_all();
  return over_.wait_for(lock, most, [&] { return work_ended_ || !thread_.joinable(); });
}

void Watch::start() {
  thread_ = std::thread([this] { work(); });
}

void Watch::ended(const fs::path& path) {
  const std::lock_guard lock(mutex_);
  under_way_.erase(path.string());
}

void Watch::work() {
  std::unique_lock lock(mutex_);
  while (!quit_) {
    lock.unlock();
    try {
      poll();
    } catch (const std::exception&) {  // a folder that vanishes, a full disk: look again at the next poll
    }
    lock.lock();
    wake_.wait_for(lock, every_, [&] { return quit_; });
  }
  work_ended_ = true;
  over_.notify_all();
}

void Watch::poll() {
  std::map<std::string, Seen> next;
  for (const auto& candidate : candidates(folder_)) {
    const auto path = candidate.path.string();
    Seen seen = seen_.contains(path) ? seen_[path] : Seen{};
    if (seen.stamp != candidate.stamp) seen = {candidate.stamp, 0, false};
    ++seen.polls;
    const auto submit = [&] {
      if (seen.refused || seen.polls < (candidate.tracked ? kTrackedPolls : kUntrackedPolls)) return;
      if (const std::lock_guard lock(mutex_); quit_ || under_way_.contains(path)) return;
      if (history_.is_done({path, candidate.stamp})) return;
      if (!candidate.tracked) {
        try {
          formats::OpenOptions options;
          options.places = false;
          formats::open(candidate.path, options);
        } catch (const std::exception&) {
          seen.refused = true;
          return;
        }
      }
      {
        const std::lock_guard lock(mutex_);
        under_way_.insert(path);
      }
      if (submit_(candidate)) return;
      const std::lock_guard lock(mutex_);
      under_way_.erase(path);
    };
    submit();
    next[path] = std::move(seen);
  }
  seen_ = std::move(next);
}

}  // namespace cli
