// Rank 0 takes whoever knows the secret and is a rank that is missing; strangers are closed without a word, and cannot make it wait.
#include "ranks/join.h"

#include "libshard/stop.h"

#include <fcntl.h>
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <random>
#include <thread>
#include <utility>

namespace ranks {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;
using shard::Code;
using std::chrono::milliseconds;

constexpr std::string_view kMagic = "shardkit-ranks-1";
constexpr std::size_t kMostHello = 1024, kMostStrangers = 256, kMostFile = 64 << 10;
constexpr auto kHelloWithin = std::chrono::seconds(5);
constexpr auto kSilent = std::chrono::seconds(2), kSilentBesides = std::chrono::seconds(10);  // rank 0 tells for the others that are there

std::vector<std::string> lines_of(std::string_view text) {
  std::vector<std::string> out;
  while (!text.empty()) {
    const auto end = text.find('\n');
    out.emplace_back(text.substr(0, end));
    text.remove_prefix(end == text.npos ? text.size() : end + 1);
  }
  return out;
}

/// In a time that does not tell how much of it is right.
bool same_secret(std::string_view a, std::string_view b) {
  unsigned char differs = a.size() != b.size();
  for (std::size_t i = 0; i < a.size(); ++i) differs |= static_cast<unsigned char>(a[i] ^ b[b.empty() ? 0 : i % b.size()]);
  return !differs;
}

void check_stop(const std::atomic<bool>* stop) {
  shard::refuse_stopped(stop);
}

std::string seconds(milliseconds patience) { return fmt::format("{:g} s", static_cast<double>(patience.count()) / 1000); }

// --- the file ---------------------------------------------------------------------------------------------------------

std::string new_secret() {
  std::random_device source;
  std::string out;
  for (int i = 0; i < 8; ++i) out += fmt::format("{:08x}", source());
  return out;
}

/// Removed when all are here, or nobody will come.
class MeetingFile {
 public:
  MeetingFile(const fs::path& path, const std::string& text) : path_(path) {
    std::error_code error;
    fs::create_directories(path.parent_path(), error);
    const auto draft = fs::path(fmt::format("{}.{}", path.string(), ::getpid()));
    const int fd = ::open(draft.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0600);
    const bool written = fd >= 0 && ::write(fd, text.data(), text.size()) == static_cast<ssize_t>(text.size());
    if (fd >= 0) ::close(fd);
    if (written) fs::rename(draft, path, error);
    if (!written || error) fs::remove(draft, error);
    shard::require(written && fs::exists(path), Code::Io, [&] { return fmt::format("{}: cannot be written; the ranks meet by it", path.string()); });
  }
  ~MeetingFile() {
    std::error_code error;
    fs::remove(path_, error);
  }

 private:
  fs::path path_;
};

struct Known {
  std::string port, word;
  std::vector<std::string> hosts;
};

/// Nothing while there is no such file, or none of ours.
std::optional<Known> read_meeting(const fs::path& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
  if (fd < 0) return std::nullopt;
  std::string text(kMostFile, '\0');
  const auto got = ::read(fd, text.data(), text.size());
  ::close(fd);
  text.resize(static_cast<std::size_t>(std::max<ssize_t>(got, 0)));
  const auto lines = lines_of(text);
  if (lines.size() < 4 || lines[0] != kMagic) return std::nullopt;
  Known out{lines[2], lines[3], {}};
  if (lines[1] == host_name()) out.hosts = {"127.0.0.1", "::1"};
  out.hosts.insert(out.hosts.end(), lines.begin() + 4, lines.end());
  if (lines[1] != host_name()) out.hosts.push_back(lines[1]);
  return out;
}

// --- rank 0 -----------------------------------------------------------------------------------------------------------

struct Stranger {
  Socket socket;
  Inbound in{{}, kMostHello};
  Clock::time_point until;
};

class Door {
 public:
  Door(const Launch& launch, std::string secret) : launch_(launch), secret_(std::move(secret)), ranks_(static_cast<std::size_t>(launch.size)) {}

  std::vector<Socket> wait(const Socket& listener, milliseconds patience, const std::atomic<bool>* stop, Waiting waiting) {
    const auto begin = Clock::now(), until = begin + patience;
    while (missing() > 0) {
      if (const bool late = Clock::now() > until; late || (stop && *stop)) {
        const auto why = late ? still_missing(patience) : "stopped by a signal";
        refuse_all(why);
        shard::fail(Code::Io, "{}", why);
      }
      std::vector<pollfd> watched{{listener.fd(), POLLIN, 0}};
      for (const auto& one : strangers_) watched.push_back({one.socket.fd(), POLLIN, 0});
      for (const auto& rank : ranks_)
        if (rank) watched.push_back({rank.fd(), POLLIN, 0});
      ::poll(watched.data(), watched.size(), 100);
      while (auto fresh = accept_one(listener)) {
        if (strangers_.size() >= kMostStrangers) strangers_.erase(strangers_.begin());
        strangers_.push_back({std::move(fresh), {{}, kMostHello}, Clock::now() + kHelloWithin});
      }
      std::erase_if(strangers_, [&](Stranger& one) { return look_at(one); });
      check_present();
      if (waiting && missing() > 0 && Clock::now() - begin > kSilent)
        std::exchange(waiting, nullptr)(fmt::format("waiting for {} of {} ranks (rank {}), for at most {}; {}", missing(), launch_.size, absent(40), seconds(patience), why_so_many()));
    }
    for (const auto& rank : ranks_)
      if (rank) send_frame(rank, Kind::Welcome, "");
    return std::move(ranks_);
  }

 private:
  std::ptrdiff_t missing() const { return std::count_if(ranks_.begin() + 1, ranks_.end(), [](const Socket& rank) { return !rank; }); }

  std::string absent(std::size_t longest = std::string::npos) const {
    std::string who;
    for (std::size_t r = 1; r < ranks_.size(); ++r) {
      if (ranks_[r]) continue;
      if (who.size() > longest) return who + ", …";
      who += fmt::format("{}{}", who.empty() ? "" : ", ", r);
    }
    return who;
  }

  std::string why_so_many() const { return fmt::format("{}={} says how many there are (without it one process works alone)", launch_.from, launch_.size); }

  std::string still_missing(milliseconds patience) const {
    return fmt::format("rank {} did not come within {}; {}{}", absent(), seconds(patience), why_so_many(),
                       refused_ ? fmt::format("; {} connections without the secret were refused", refused_) : "");
  }

  void refuse_all(const std::string& why) {
    for (const auto& rank : ranks_)
      if (rank) send_frame(rank, Kind::Refuse, why);
  }

  /// A rank that is here says nothing before it is welcomed: a byte or an end means that it gave up.
  void check_present() {
    for (std::size_t r = 1; r < ranks_.size(); ++r) {
      if (!ranks_[r]) continue;
      Inbound rest{{}, 0};
      rest.pump(ranks_[r]);
      if (rest.state == Inbound::State::Open && rest.bytes.empty()) continue;
      ranks_[r] = {};
      const auto why = fmt::format("rank {} left before all ranks had come", r);
      refuse_all(why);
      shard::fail(Code::Io, "{}", why);
    }
  }

  /// Whether this connection is settled, one way or the other.
  bool look_at(Stranger& one) {
    one.in.pump(one.socket);
    const auto frame = one.in.next();
    if (!frame) return one.in.state != Inbound::State::Open || Clock::now() > one.until;
    const auto lines = lines_of(frame->text);
    if (frame->kind != Kind::Hello || lines.size() != 4 || lines[0] != kMagic || !same_secret(lines[3], secret_)) {
      ++refused_;
      return true;
    }
    const auto number = [](const std::string& text) {
      int out = -1;
      std::from_chars(text.data(), text.data() + text.size(), out);
      return out;
    };
    const int rank = number(lines[1]), size = number(lines[2]);
    if (size != launch_.size) send_frame(one.socket, Kind::Refuse, fmt::format("rank {} says there are {} ranks; rank 0 says {}", rank, size, launch_.size));
    else if (rank < 1 || rank >= size || ranks_[static_cast<std::size_t>(rank)]) send_frame(one.socket, Kind::Refuse, fmt::format("a rank {} is here already", rank));
    else ranks_[static_cast<std::size_t>(rank)] = std::move(one.socket);
    return true;
  }

  const Launch& launch_;
  std::string secret_;
  std::vector<Socket> ranks_;
  std::vector<Stranger> strangers_;
  int refused_ = 0;
};

std::vector<Socket> receive_all(const Launch& launch, const Place& place, milliseconds patience, const std::atomic<bool>* stop, const Waiting& waiting) {
  if (!place.host.empty()) {
    const auto listener = listen_on(place.host, place.port);
    return Door(launch, place.secret).wait(listener, patience, stop, waiting);
  }
  const bool one_host = launch.local_size == launch.size;
  const auto listener = listen_on(one_host ? "127.0.0.1" : "", "0");
  const auto word = new_secret();
  auto text = fmt::format("{}\n{}\n{}\n{}\n", kMagic, host_name(), port_of(listener), word);
  if (!one_host)
    for (const auto& address : own_addresses()) text += address + '\n';
  const MeetingFile file(place.file, text);
  return Door(launch, word + place.secret).wait(listener, patience, stop, waiting);
}

// --- the others -------------------------------------------------------------------------------------------------------

/// Welcomed, or nothing and why. Throws what rank 0 refused this rank for.
std::optional<Connection> knock(const Launch& launch, const std::string& host, const std::string& port, const std::string& secret, Clock::time_point until, const std::atomic<bool>* stop, std::string& why) {
  auto out = connect_to(host, port, std::chrono::seconds(2), why);
  if (!out) return std::nullopt;
  why = "the connection was closed";
  if (!send_frame(out, Kind::Hello, fmt::format("{}\n{}\n{}\n{}", kMagic, launch.rank, launch.size, secret))) return std::nullopt;
  Inbound in{{}, kMostHello};
  while (in.state == Inbound::State::Open && Clock::now() < until) {
    check_stop(stop);
    pollfd one{out.fd(), POLLIN, 0};
    ::poll(&one, 1, 100);
    in.pump(out);
    if (const auto frame = in.next()) {
      if (frame->kind == Kind::Welcome) return Connection{std::move(out), std::move(in.bytes)};
      shard::require(frame->kind != Kind::Refuse, Code::Io, [&] { return frame->text; });
      return std::nullopt;
    }
  }
  if (in.state == Inbound::State::Open) why = "it has not said that all ranks are there";
  return std::nullopt;
}

Connection find_rank_0(const Launch& launch, const Place& place, milliseconds patience, const std::atomic<bool>* stop, Waiting waiting) {
  const auto where = place.host.empty() ? place.file.string() : fmt::format("{}:{}", place.host, place.port);
  const auto begin = Clock::now(), until = begin + patience, at_most = until + std::chrono::seconds(5);  // rank 0 may have begun to wait later
  std::string why = "there is no such file yet";
  do {
    check_stop(stop);
    if (!place.host.empty()) {
      if (auto out = knock(launch, place.host, place.port, place.secret, at_most, stop, why)) return std::move(*out);
      shard::require(why != "the connection was closed", Code::Io,
                     [&] { return fmt::format("{}:{}: refused rank {}: is SHARDKIT_SECRET the same in every rank?", place.host, place.port, launch.rank); });
    } else if (const auto known = read_meeting(place.file)) {
      for (const auto& host : known->hosts)
        if (auto out = knock(launch, host, known->port, known->word + place.secret, at_most, stop, why)) return std::move(*out);
    }
    if (waiting && Clock::now() - begin > kSilentBesides)
      std::exchange(waiting, nullptr)(fmt::format("rank {} waits for rank 0 at {}, for at most {}: {}; {}={} says that there are others", launch.rank, where, seconds(patience), why, launch.from, launch.size));
    std::this_thread::sleep_for(milliseconds(50));
  } while (Clock::now() < until);
  shard::fail(Code::Io, "{}: rank {} did not find rank 0 there within {}: {}", where, launch.rank, seconds(patience), why);
}

}  // namespace

std::vector<Connection> join(const Launch& launch, const Place& place, milliseconds patience, const std::atomic<bool>* stop, const Waiting& waiting) {
  std::vector<Connection> out;
  if (launch.rank != 0) out.push_back(find_rank_0(launch, place, patience, stop, waiting));
  else
    for (auto& socket : receive_all(launch, place, patience, stop, waiting)) out.push_back({std::move(socket), ""});
  return out;
}

}  // namespace ranks
