// NCCL's documented meaning among threads and processes of one host, for the entry points that gpu/libs/nccl.cpp calls. Ranks meet in shared
// memory, whose name is the id. Payloads go through it in small chunks. As in NCCL, a rank waits until the others come or it is aborted.
#include "tests/gpu/emulated/fake_libs/fake.h"

#include "libshard/float_bits.h"

#include <nccl.h>

#include <fcntl.h>
#include <pthread.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <set>
#include <string>
#include <vector>

FakeEnqueue fake_enqueue = nullptr;
FakeWait fake_wait = nullptr;

namespace {

constexpr int kRanks = 8;
constexpr std::size_t kChunk = 8192;

/// One chunk on its way between two ranks.
struct Mail {
  std::size_t filled, total;  // of this chunk, of the whole message; 0: empty
  std::byte bytes[kChunk];
};
/// What a rank brings to a collective.
struct Slot {
  std::uint64_t signature;
  std::byte bytes[kChunk];
};
struct Meeting {
  pthread_mutex_t mutex;
  pthread_cond_t changed;
  int size, arrived;
  bool here[kRanks], mismatch;  // mismatch: two ends differ, where NCCL would hang or worse
  std::uint64_t round;
  Slot slots[kRanks];
  Mail mail[kRanks][kRanks];
};

thread_local std::string last_error;
ncclResult_t fail(ncclResult_t status, std::string why) {
  last_error = std::move(why);
  return status;
}

class Locked {
 public:
  explicit Locked(Meeting& m) : m_(m) { pthread_mutex_lock(&m.mutex); }
  ~Locked() { pthread_mutex_unlock(&m_.mutex); }
  void wait() { pthread_cond_wait(&m_.changed, &m_.mutex); }
  void tell() { pthread_cond_broadcast(&m_.changed); }

 private:
  Meeting& m_;
};

std::size_t size_of(ncclDataType_t type) { return type == ncclFloat32 ? 4 : type == ncclFloat16 || type == ncclBfloat16 ? 2 : type == ncclUint8 ? 1 : 0; }
float read(const std::byte* from, ncclDataType_t type) {
  if (type == ncclFloat32) return shard::load<float>(from);
  const auto bits = shard::load<std::uint16_t>(from);
  return std::bit_cast<float>(type == ncclFloat16 ? shard::widen<shard::kF16>(bits) : shard::widen<shard::kBF16>(bits));
}
void write(std::byte* to, ncclDataType_t type, float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  if (type == ncclFloat32) shard::store(to, value);
  else shard::store(to, static_cast<std::uint16_t>(type == ncclFloat16 ? shard::narrow<shard::kF16>(bits) : shard::narrow<shard::kBF16>(bits)));
}

/// Whoever is aborted stays, for calls that are under way.
std::mutex living_mutex;
std::set<ncclComm*>& living = *new std::set<ncclComm*>;  // never ended: there is no last user

}  // namespace

struct ncclComm {
  Meeting* meeting;
  int rank;
  std::atomic<int> error;
  std::atomic<bool> aborted = false;  // by its own rank: that others gave up does not free it
  bool stopped() const { return aborted || meeting->mismatch; }
};

namespace {

/// All ranks, or an abort (false). `while_waiting` tells how: from a stream's work or from the host.
bool barrier(ncclComm& comm) {
  auto& m = *comm.meeting;
  bool good = false;
  const auto wait = [&] {
    Locked locked(m);
    const auto mine = m.round;
    if (++m.arrived == m.size) {
      m.arrived = 0;
      ++m.round;
      locked.tell();
    }
    while (m.round == mine && !comm.stopped()) locked.wait();
    good = m.round != mine;
  };
  fake_wait(wait);
  return good;
}

/// Every rank shows chunks of what it brings (null: nothing), then looks at all of them.
void collective(ncclComm& comm, std::uint64_t signature, std::size_t bytes, const std::byte* mine, const std::function<void(std::size_t at, std::size_t count)>& look) {
  auto& m = *comm.meeting;
  for (std::size_t at = 0; at < bytes; at += kChunk) {
    const auto count = std::min(kChunk, bytes - at);
    m.slots[comm.rank].signature = signature * 1000003 + bytes;
    if (mine) std::memcpy(m.slots[comm.rank].bytes, mine + at, count);
    if (!barrier(comm)) return void(comm.error = ncclRemoteError);
    for (int r = 0; r < m.size; ++r)
      if (m.slots[r].signature != m.slots[comm.rank].signature) comm.error = ncclInvalidUsage;
    look(at, count);
    if (!barrier(comm)) return void(comm.error = ncclRemoteError);
  }
}

struct Move {
  bool send;
  int peer;
  std::byte* memory;
  std::size_t bytes, done = 0;
};

/// The first unfinished move of each way and peer goes on as long as its mail box allows.
bool step(ncclComm& comm, std::vector<Move>& moves) {
  auto& m = *comm.meeting;
  bool moved = false, used[2][kRanks] = {};
  for (auto& move : moves) {
    if (move.done == move.bytes || std::exchange(used[move.send][move.peer], true)) continue;
    auto& mail = move.send ? m.mail[comm.rank][move.peer] : m.mail[move.peer][comm.rank];
    if (move.send != (mail.filled == 0)) continue;
    if (move.send) {
      mail.total = move.bytes;
      mail.filled = std::min(kChunk, move.bytes - move.done);
      std::memcpy(mail.bytes, move.memory + move.done, mail.filled);
      move.done += mail.filled;
    } else {
      if (mail.total != move.bytes) return m.mismatch = true;
      std::memcpy(move.memory + move.done, mail.bytes, mail.filled);
      move.done += mail.filled;
      mail.filled = 0;
    }
    moved = true;
  }
  return moved;
}

void transfer(ncclComm& comm, std::vector<Move> moves) {
  auto& m = *comm.meeting;
  const auto left = [&] { return std::any_of(moves.begin(), moves.end(), [](const Move& move) { return move.done < move.bytes; }); };
  while (left()) {
    bool moved = false, aborted = false;
    {
      Locked locked(m);
      aborted = comm.stopped();
      if (!aborted && (moved = step(comm, moves))) locked.tell();
    }
    if (aborted) return void(comm.error = m.mismatch ? ncclInvalidUsage : ncclRemoteError);
    if (!moved)
      fake_wait([&] {
        Locked locked(m);
        for (const auto& move : moves)
          if (move.done < move.bytes && move.send == ((move.send ? m.mail[comm.rank][move.peer] : m.mail[move.peer][comm.rank]).filled == 0)) return;
        if (!comm.stopped()) locked.wait();
      });
  }
}

struct Pending {
  ncclComm_t comm;
  cudaStream_t stream;
  std::vector<Move> moves;
};
thread_local int depth = 0;
thread_local std::vector<Pending> pending;

ncclResult_t move(bool send, std::byte* memory, std::size_t bytes, int peer, ncclComm_t comm, cudaStream_t stream) {
  if (peer < 0 || peer >= comm->meeting->size) return fail(ncclInvalidArgument, "peer " + std::to_string(peer) + " is no rank");
  const Move one{send, peer, memory, bytes};
  if (depth == 0) {
    fake_enqueue(stream, [=] { transfer(*comm, {one}); });
    return ncclSuccess;
  }
  for (auto& group : pending)
    if (group.comm == comm && group.stream == stream) return group.moves.push_back(one), ncclSuccess;
  pending.push_back({comm, stream, {one}});
  return ncclSuccess;
}

}  // namespace

extern "C" {

ncclResult_t ncclGetVersion(int* version) {
  *version = 22809;
  return ncclSuccess;
}
const char* ncclGetErrorString(ncclResult_t status) {
  return status == ncclInvalidArgument ? "invalid argument" : status == ncclInvalidUsage ? "invalid usage" : status == ncclRemoteError ? "remote process exited or there was a network error" : "another failure";
}
const char* ncclGetLastError(ncclComm_t) { return last_error.c_str(); }

ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  static std::atomic<int> count = 0;
  std::memset(id, 0, sizeof *id);
  std::snprintf(id->internal, sizeof id->internal, "/fake_nccl_%d_%d_%lx", ::getpid(), count++, static_cast<long>(::time(nullptr)));
  const int fd = ::shm_open(id->internal, O_CREAT | O_EXCL | O_RDWR, 0600);
  if (fd < 0 || ::ftruncate(fd, sizeof(Meeting)) != 0) return fail(ncclSystemError, "no shared memory");
  auto* const m = static_cast<Meeting*>(::mmap(nullptr, sizeof(Meeting), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0));
  ::close(fd);
  pthread_mutexattr_t mutex;
  pthread_mutexattr_init(&mutex);
  pthread_mutexattr_setpshared(&mutex, PTHREAD_PROCESS_SHARED);
  pthread_mutex_init(&m->mutex, &mutex);
  pthread_condattr_t cond;
  pthread_condattr_init(&cond);
  pthread_condattr_setpshared(&cond, PTHREAD_PROCESS_SHARED);
  pthread_cond_init(&m->changed, &cond);
  ::munmap(m, sizeof(Meeting));
  return ncclSuccess;
}

ncclResult_t ncclCommInitRank(ncclComm_t* comm, int size, ncclUniqueId id, int rank) {
  if (size < 1 || size > kRanks || rank < 0 || rank >= size) {
    ::shm_unlink(id.internal);
    return fail(ncclInvalidArgument, "rank " + std::to_string(rank) + " of " + std::to_string(size));
  }
  const int fd = ::shm_open(id.internal, O_RDWR, 0600);
  if (fd < 0) return fail(ncclRemoteError, "nobody has this id");
  auto* const m = static_cast<Meeting*>(::mmap(nullptr, sizeof(Meeting), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0));
  ::close(fd);
  {
    Locked locked(*m);
    if (m->here[rank] || (m->size && m->size != size)) return fail(ncclInvalidUsage, "rank " + std::to_string(rank) + " is here already, or sizes differ");
    m->here[rank] = true;
    m->size = size;
    locked.tell();
    if (std::count(m->here, m->here + kRanks, true) == size) ::shm_unlink(id.internal);  // all have it
    while (std::count(m->here, m->here + kRanks, true) < size) locked.wait();
  }
  *comm = new ncclComm{m, rank, {ncclSuccess}};
  {
    const std::lock_guard lock(living_mutex);
    living.insert(*comm);
  }
  return ncclSuccess;
}
ncclResult_t ncclCommDestroy(ncclComm_t comm) {
  ::munmap(comm->meeting, sizeof(Meeting));
  {
    const std::lock_guard lock(living_mutex);
    living.erase(comm);
  }
  delete comm;
  return ncclSuccess;
}
ncclResult_t ncclCommAbort(ncclComm_t comm) {
  Locked locked(*comm->meeting);
  comm->aborted = true;
  comm->error = ncclRemoteError;
  locked.tell();
  return ncclSuccess;
}
ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* status) {
  *status = static_cast<ncclResult_t>(comm->error.load());
  return ncclSuccess;
}

ncclResult_t ncclAllReduce(const void* from, void* to, std::size_t count, ncclDataType_t type, ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream) {
  const auto item = size_of(type);
  if (item == 0 || (op != ncclSum && op != ncclMax)) return fail(ncclInvalidArgument, "type or operation");
  fake_enqueue(stream, [=] {
    auto* const out = static_cast<std::byte*>(to);
    collective(*comm, 1 + 8 * static_cast<std::uint64_t>(type) + 256 * static_cast<std::uint64_t>(op), count * item, static_cast<const std::byte*>(from), [&](std::size_t at, std::size_t bytes) {
      for (std::size_t i = 0; i < bytes; i += item) {
        float all = read(comm->meeting->slots[0].bytes + i, type);
        for (int r = 1; r < comm->meeting->size; ++r) {
          const auto next = read(comm->meeting->slots[r].bytes + i, type);
          all = op == ncclSum ? all + next : std::max(all, next);
        }
        write(out + at + i, type, all);
      }
    });
  });
  return ncclSuccess;
}
ncclResult_t ncclBroadcast(const void* from, void* to, std::size_t count, ncclDataType_t type, int root, ncclComm_t comm, cudaStream_t stream) {
  if (root < 0 || root >= comm->meeting->size) return fail(ncclInvalidArgument, "root " + std::to_string(root) + " is no rank");
  fake_enqueue(stream, [=] {
    const auto* const mine = comm->rank == root ? static_cast<const std::byte*>(from) : nullptr;
    collective(*comm, 2 + 8 * static_cast<std::uint64_t>(root), count * size_of(type), mine, [&](std::size_t at, std::size_t bytes) {
      std::memcpy(static_cast<std::byte*>(to) + at, comm->meeting->slots[root].bytes, bytes);
    });
  });
  return ncclSuccess;
}
ncclResult_t ncclAllGather(const void* from, void* to, std::size_t count, ncclDataType_t type, ncclComm_t comm, cudaStream_t stream) {
  fake_enqueue(stream, [=] {
    const auto each = count * size_of(type);
    const std::vector<std::byte> mine(static_cast<const std::byte*>(from), static_cast<const std::byte*>(from) + each);  // it may lie in `to`
    collective(*comm, 3, each, mine.data(), [&](std::size_t at, std::size_t bytes) {
      for (int r = 0; r < comm->meeting->size; ++r) std::memcpy(static_cast<std::byte*>(to) + static_cast<std::size_t>(r) * each + at, comm->meeting->slots[r].bytes, bytes);
    });
  });
  return ncclSuccess;
}
ncclResult_t ncclSend(const void* from, std::size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream) {
  return move(true, static_cast<std::byte*>(const_cast<void*>(from)), count * size_of(type), peer, comm, stream);
}
ncclResult_t ncclRecv(void* to, std::size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream) {
  return move(false, static_cast<std::byte*>(to), count * size_of(type), peer, comm, stream);
}
ncclResult_t ncclGroupStart() {
  ++depth;
  return ncclSuccess;
}
ncclResult_t ncclGroupEnd() {
  if (--depth > 0) return ncclSuccess;
  for (auto& group : std::exchange(pending, {})) fake_enqueue(group.stream, [comm = group.comm, moves = group.moves] { transfer(*comm, moves); });
  return ncclSuccess;
}

}  // extern "C"
