// A star around rank 0. One thread a process reads whatever comes, so that a failure is heard at any time; rank 0 passes it on.
#include "ranks/rendezvous.h"

#include "libshard/stop.h"
#include "ranks/join.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <condition_variable>
#include <cstring>
#include <deque>
#include <mutex>
#include <thread>

namespace ranks {
namespace {

using shard::Code;
using std::chrono::milliseconds;

constexpr std::size_t kMostAnswer = std::size_t{1} << 30;
constexpr auto kFarewell = std::chrono::seconds(10);

struct Peer {
  Socket socket;
  Inbound in{{}, 0};
  std::deque<std::string> texts;
  bool left = false;                   // said goodbye, or is gone
  bool closed = false;                 // says nothing more
  std::mutex sending;
};

std::string failure_text(const shard::Error& why) { return fmt::format("{}\n{}", static_cast<int>(why.code), why.what()); }

shard::Error read_failure(const std::string& text) {
  const auto line = text.find('\n');
  int code = 0;
  for (std::size_t i = 0; i < std::min<std::size_t>(line, 2) && i < text.size(); ++i) code = 10 * code + (text[i] - '0');
  const bool known = code >= static_cast<int>(Code::Usage) && code <= static_cast<int>(Code::Device) && line != text.npos;
  return {known ? static_cast<Code>(code) : Code::Io, known ? text.substr(line + 1) : "a rank failed"};
}

}  // namespace

struct Rendezvous::State {
  Launch launch;
  const std::atomic<bool>* stop;
  std::vector<std::unique_ptr<Peer>> peers;  // rank 0: by rank, none at 0; the others: rank 0 alone
  std::mutex telling;                        // held until a failure is told, so that no goodbye comes before it; taken before `mutex`
  std::mutex mutex;
  std::condition_variable changed;
  std::optional<shard::Error> failure;
  std::atomic<bool> failed = false;
  std::function<void()> call;
  bool finished = false, ending = false;
  Socket wake{::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
  std::thread reader;

  int rank_of(const Peer& peer) const {
    for (std::size_t r = 0; r < peers.size(); ++r)
      if (peers[r].get() == &peer) return static_cast<int>(r);
    return 0;
  }

  void send(Peer& peer, Kind kind, std::string_view text) {
    const std::lock_guard lock(peer.sending);
    send_frame(peer.socket, kind, text);  // that it is gone is heard by the reader
  }

  /// The first one counts; tells everyone but `from`, who knows.
  void set_failure(const shard::Error& why, const Peer* from) {
    std::function<void()> calling;
    {
      const std::lock_guard told(telling);
      {
        const std::lock_guard lock(mutex);
        if (failure) return;
        failure = why;
        failed = true;
        calling = std::exchange(call, nullptr);
        changed.notify_all();
      }
      for (const auto& peer : peers)
        if (peer && peer.get() != from && (!from || launch.rank == 0)) send(*peer, Kind::Fail, failure_text(why));
    }
    if (calling) calling();
  }

  void take(Peer& peer, Frame frame) {
    if (frame.kind == Kind::Fail) return set_failure(read_failure(frame.text), &peer);
    if (frame.kind == Kind::Bye && launch.rank == 0) end_sending(peer.socket);  // it waits for this
    const std::lock_guard lock(mutex);
    if (frame.kind == Kind::Data) peer.texts.push_back(std::move(frame.text));
    else peer.left = true;
    changed.notify_all();
  }

  void read(Peer& peer) {
    peer.in.pump(peer.socket);
    while (auto frame = peer.in.next()) take(peer, std::move(*frame));
    if (peer.in.state == Inbound::State::Open) return;
    bool gone = false;
    {
      const std::lock_guard lock(mutex);
      gone = !peer.left && !finished;
    }
    if (gone)  // before `left`, which alone would mean that it may be
      set_failure({Code::Io, fmt::format("rank {}: {}", rank_of(peer), peer.in.state == Inbound::State::Closed ? "is gone: its connection was closed" : "sent what no rank sends")}, &peer);
    const std::lock_guard lock(mutex);
    peer.left = peer.closed = true;
    changed.notify_all();
  }

  void read_on() {
    for (const auto& peer : peers)
      if (peer) read(*peer);  // what came early makes no noise
    for (;;) {
      std::vector<pollfd> watched{{wake.fd(), POLLIN, 0}};
      std::vector<Peer*> by;
      {
        const std::lock_guard lock(mutex);
        if (ending) return;
        for (const auto& peer : peers)
          if (peer && peer->in.state == Inbound::State::Open) {
            watched.push_back({peer->socket.fd(), POLLIN, 0});
            by.push_back(peer.get());
          }
      }
      if (::poll(watched.data(), watched.size(), -1) <= 0) continue;
      for (std::size_t i = 0; i < by.size(); ++i)
        if (watched[i + 1].revents) read(*by[i]);
    }
  }

  std::string receive(Peer& peer) {
    std::unique_lock lock(mutex);
    while (peer.texts.empty()) {
      if (failure) throw *failure;
      shard::refuse_stopped(stop);
      shard::require(!peer.left, Code::Io, [&] { return fmt::format("rank {}: has finished already", rank_of(peer)); });
      changed.wait_for(lock, milliseconds(100));
    }
    auto out = std::move(peer.texts.front());
    peer.texts.pop_front();
    return out;
  }
};

Rendezvous::Rendezvous(const Launch& launch, const Place& place, milliseconds patience, const std::atomic<bool>* stop, const Waiting& waiting) : state_(std::make_unique<State>()) {
  state_->launch = launch;
  state_->stop = stop;
  for (auto& [socket, early] : join(launch, place, patience, stop, waiting)) {
    auto& peer = state_->peers.emplace_back();
    if (!socket) continue;
    peer = std::make_unique<Peer>();
    peer->socket = std::move(socket);
    peer->in.bytes = std::move(early);
    peer->in.most = launch.rank == 0 ? kMost : kMostAnswer;
  }
  state_->reader = std::thread([state = state_.get()] { state->read_on(); });
}

Rendezvous::~Rendezvous() {
  auto& s = *state_;
  // Waits, where there was a failure, until it is told.
  if (!s.finished) s.set_failure({Code::Io, fmt::format("rank {}: left early", s.launch.rank)}, nullptr);
  for (const auto& peer : s.peers)
    if (peer) s.send(*peer, Kind::Bye, "");
  {
    // Rank 0: what the others still do may need what it is about to remove. The others: a connection that is closed with something unread would take
    // what was last said with it.
    std::unique_lock lock(s.mutex);
    s.changed.wait_for(lock, kFarewell, [&] {
      for (const auto& peer : s.peers)
        if (peer && !(s.launch.rank == 0 ? peer->left : peer->closed)) return false;
      return true;
    });
  }
  {
    const std::lock_guard lock(s.mutex);
    s.ending = true;
  }
  const std::uint64_t one = 1;
  [[maybe_unused]] const auto woken = ::write(s.wake.fd(), &one, sizeof one);
  s.reader.join();
}

int Rendezvous::rank() const { return state_->launch.rank; }
int Rendezvous::size() const { return state_->launch.size; }

std::vector<std::string> Rendezvous::all_gather(std::string_view mine) {
  auto& s = *state_;
  check();
  shard::require(mine.size() <= kMost, Code::Io, [&] { return fmt::format("rank {}: {} bytes are more than ranks tell each other at once", rank(), mine.size()); });
  std::vector<std::string> out(static_cast<std::size_t>(size()));
  if (rank() == 0) {
    std::string all;
    const auto add = [&](std::string_view text) {
      const std::uint64_t length = text.size();
      all.append(reinterpret_cast<const char*>(&length), sizeof length).append(text);
    };
    out[0] = mine;
    add(mine);
    for (std::size_t r = 1; r < out.size(); ++r) add(out[r] = s.receive(*s.peers[r]));
    shard::require(all.size() <= kMostAnswer, Code::Io, [] { return "the ranks tell each other more than 1 GiB at once"; });
    for (std::size_t r = 1; r < out.size(); ++r) s.send(*s.peers[r], Kind::Data, all);
    return out;
  }
  s.send(*s.peers[0], Kind::Data, mine);
  const auto all = s.receive(*s.peers[0]);
  std::size_t at = 0;
  for (auto& text : out) {
    std::uint64_t length = 0;
    shard::require(all.size() - at >= sizeof length, Code::Io, [] { return "rank 0: sent what no rank sends"; });
    std::memcpy(&length, all.data() + at, sizeof length);
    at += sizeof length;
    shard::require(length <= all.size() - at, Code::Io, [] { return "rank 0: sent what no rank sends"; });
    text = all.substr(at, length);
    at += length;
  }
  return out;
}

std::string Rendezvous::broadcast(std::string_view text, int root) { return all_gather(rank() == root ? text : "")[static_cast<std::size_t>(root)]; }

void Rendezvous::finish() {
  barrier();
  const std::lock_guard lock(state_->mutex);
  state_->finished = true;
}

void Rendezvous::fail(const shard::Error& why) { state_->set_failure(why.within(fmt::format("rank {}", rank())), nullptr); }

const std::atomic<bool>& Rendezvous::failed() const { return state_->failed; }

void Rendezvous::on_failure(std::function<void()> call) {
  auto& s = *state_;
  {
    const std::lock_guard lock(s.mutex);
    if (!s.failed) {
      s.call = std::move(call);
      return;
    }
  }
  call();
}

void Rendezvous::check() const {
  const std::lock_guard lock(state_->mutex);
  if (state_->failure) throw *state_->failure;
}

}  // namespace ranks
