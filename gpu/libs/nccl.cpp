// One call each; a group around transfers. Blocking communicators: a non-blocking one would start a thread for every group.
#include "gpu/libs/nccl.h"

#include "gpu/libs/library.h"
#include "libshard/error.h"

#if __has_include(<nccl.h>)
#include <nccl.h>

#include <atomic>
#include <chrono>
#include <exception>
#include <mutex>
#include <thread>

namespace gpu {
namespace {

using shard::Code;
using shard::DType;

constexpr int kLeastVersion = 21800;

ncclDataType_t nccl_type(DType type) {
  switch (type) {
    case DType::F32: return ncclFloat32;
    case DType::BF16: return ncclBfloat16;
    case DType::F16: return ncclFloat16;
    default: shard::fail(Code::Device, "NCCL: {} is no type of a reduction here; f32, bf16 and f16 are", shard::name(type));
  }
}

}  // namespace

struct Nccl::Api {
  explicit Api(const std::string& path) : library("NCCL", path, {"libnccl.so.2"}) {
    library.resolve(get_version, "ncclGetVersion");
    library.resolve(text, "ncclGetErrorString");
    library.resolve(last_error, "ncclGetLastError");
    library.resolve(unique_id, "ncclGetUniqueId");
    library.resolve(init, "ncclCommInitRank");
    library.resolve(destroy, "ncclCommDestroy");
    library.resolve(end, "ncclCommAbort");
    library.resolve(async_error, "ncclCommGetAsyncError");
    library.resolve(all_reduce, "ncclAllReduce");
    library.resolve(broadcast, "ncclBroadcast");
    library.resolve(all_gather, "ncclAllGather");
    library.resolve(send, "ncclSend");
    library.resolve(receive, "ncclRecv");
    library.resolve(group_start, "ncclGroupStart");
    library.resolve(group_end, "ncclGroupEnd");
    int number = 0;
    check(get_version(&number), "asking its version");
    version = fmt::format("{}.{}.{}", number / 10000, number / 100 % 100, number % 100);
    shard::require(number >= kLeastVersion, Code::Device, [&] { return fmt::format("{}: is version {}; 2.18 is the least", library.title(), version); });
  }
  void check(ncclResult_t status, std::string_view doing, ncclComm_t comm = nullptr) const {
    if (status == ncclSuccess) return;
    std::string detail = last_error(comm) ? last_error(comm) : "";
    for (auto& c : detail)
      if (c == '\n') c = ' ';
    shard::fail(Code::Device, "{}: {}: {}{}{}", library.title(), doing, text(status), detail.empty() ? "" : "; ", detail);
  }

  Library library;
  std::string version;
  decltype(&ncclGetVersion) get_version;
  decltype(&ncclGetErrorString) text;
  decltype(&ncclGetLastError) last_error;
  decltype(&ncclGetUniqueId) unique_id;
  decltype(&ncclCommInitRank) init;
  decltype(&ncclCommDestroy) destroy;
  decltype(&ncclCommAbort) end;
  decltype(&ncclCommGetAsyncError) async_error;
  decltype(&ncclAllReduce) all_reduce;
  decltype(&ncclBroadcast) broadcast;
  decltype(&ncclAllGather) all_gather;
  decltype(&ncclSend) send;
  decltype(&ncclRecv) receive;
  decltype(&ncclGroupStart) group_start;
  decltype(&ncclGroupEnd) group_end;
};

Nccl::Nccl(const std::string& path) : api_(std::make_shared<const Api>(path)) {}

Nccl::Id Nccl::make_id() const {
  static_assert(sizeof(Id) == sizeof(ncclUniqueId));
  ncclUniqueId id;
  api_->check(api_->unique_id(&id), "making an id");
  return std::to_array(id.internal);
}

const std::string& Nccl::version() const { return api_->version; }

struct Communicator::State {
  std::shared_ptr<const Nccl::Api> api;
  int rank, size;
  std::shared_ptr<Together> together;
  int unwinding = std::uncaught_exceptions();
  std::mutex mutex;                                  // around calls, so that fail() does not free what one uses
  std::atomic<bool> failed = false;
  ncclComm_t comm = nullptr;

  template <typename Call>
  void call(const char* doing, Call&& call) {
    const std::lock_guard lock(mutex);
    refuse_failed();
    try {
      api->check(call(), doing, comm);
    } catch (...) {  // whoever unwinds may wait for the stream, and what it waits for there would not come
      failed = true;
      api->end(comm);
      throw;
    }
  }
  template <typename Call>
  void call_by_all(const char* doing, Call&& what) {
    if (together) together->all();
    call(doing, what);
    if (together) together->all();
  }
  ncclResult_t start(const Communicator::Transfer& t, StreamView on) const {
    const auto stream = static_cast<cudaStream_t>(on.handle);
    return t.way == Communicator::Transfer::Way::Send ? api->send(t.memory, t.bytes, ncclUint8, t.peer, comm, stream) : api->receive(t.memory, t.bytes, ncclUint8, t.peer, comm, stream);
  }
  void refuse_failed() const {
    shard::require(!failed, Code::Device, [&] { return fmt::format("{}: rank {}: another rank failed", api->library.title(), rank); });
  }
};

Communicator::Communicator(const Nccl& library, const Nccl::Id& id, int rank, int size, int device, std::shared_ptr<Together> together)
    : state_(std::make_unique<State>(library.api_, rank, size, std::move(together))) {
  if (state_->together) state_->together->all();  // NCCL itself would wait for one that failed
  use_device(device);
  ncclUniqueId raw;
  std::copy(id.begin(), id.end(), raw.internal);
  state_->api->check(state_->api->init(&state_->comm, size, raw, rank), fmt::format("rank {} of {} joins", rank, size));
}

/// A rank that leaves on an error does not wait for the others.
Communicator::~Communicator() {
  if (!state_ || state_->failed || !state_->comm) return;
  if (std::uncaught_exceptions() > state_->unwinding) state_->api->end(state_->comm);
  else state_->api->destroy(state_->comm);
}

int Communicator::rank() const { return state_->rank; }
int Communicator::size() const { return state_->size; }

void Communicator::all_reduce(std::byte* values, std::size_t count, DType type, Reduction reduction, StreamView on) {
  auto& s = *state_;
  s.call_by_all("all-reduce", [&] {
    return s.api->all_reduce(values, values, count, nccl_type(type), reduction == Reduction::Sum ? ncclSum : ncclMax, s.comm, static_cast<cudaStream_t>(on.handle));
  });
}

void Communicator::broadcast(std::byte* bytes, std::size_t count, int root, StreamView on) {
  auto& s = *state_;
  s.call_by_all("broadcast", [&] { return s.api->broadcast(bytes, bytes, count, ncclUint8, root, s.comm, static_cast<cudaStream_t>(on.handle)); });
}

void Communicator::all_gather(const std::byte* mine, std::byte* all, std::size_t count, StreamView on) {
  auto& s = *state_;
  s.call_by_all("all-gather", [&] { return s.api->all_gather(mine, all, count, ncclUint8, s.comm, static_cast<cudaStream_t>(on.handle)); });
}

void Communicator::exchange(std::span<const Transfer> transfers, StreamView on) {
  auto& s = *state_;
  s.call_by_all("exchange", [&] {
    auto status = s.api->group_start();
    for (const auto& t : transfers)
      if (status == ncclSuccess) status = s.start(t, on);
    const auto ended = s.api->group_end();
    return status != ncclSuccess ? status : ended;
  });
}

void Communicator::transfer(const Transfer& one, StreamView on) {
  auto& s = *state_;
  if (s.together) s.together->pair(one.peer);
  s.call("transfer", [&] { return s.start(one, on); });
  if (s.together) s.together->pair(one.peer);
}

void Communicator::meet_by(std::shared_ptr<Together> together) { state_->together = std::move(together); }

void Communicator::wait(StreamView on) {
  auto& s = *state_;
  const auto check = [&] {
    s.call("running", [&] {
      auto status = ncclSuccess;
      const auto asked = s.api->async_error(s.comm, &status);
      return asked != ncclSuccess ? asked : status;
    });
  };
  for (auto pause = std::chrono::microseconds(10); !done(on); pause = std::min(2 * pause, std::chrono::microseconds(1000))) {
    check();
    std::this_thread::sleep_for(pause);
  }
  check();
}

void Communicator::fail() {
  auto& s = *state_;
  if (s.failed.exchange(true)) return;
  for (int i = 0; i < 2000; ++i, std::this_thread::sleep_for(std::chrono::milliseconds(1)))
    if (const std::unique_lock lock(s.mutex, std::try_to_lock); lock) {
      if (s.comm) s.api->end(s.comm);
      return;
    }
  // A call is stuck on the host: ending it here could free what it works on. Only the process's end helps, which cli/meeting sees to.
}

#else

namespace gpu {

struct Nccl::Api {
  std::string version;
};
struct Communicator::State {};

Nccl::Nccl(const std::string&) { shard::fail(shard::Code::Device, "NCCL: this build was made without its header, nccl.h"); }
Nccl::Id Nccl::make_id() const { return {}; }
const std::string& Nccl::version() const { return api_->version; }
Communicator::Communicator(const Nccl&, const Nccl::Id&, int, int, int, std::shared_ptr<Together>) {}
Communicator::~Communicator() = default;
int Communicator::rank() const { return 0; }
int Communicator::size() const { return 0; }
void Communicator::all_reduce(std::byte*, std::size_t, shard::DType, Reduction, StreamView) {}
void Communicator::broadcast(std::byte*, std::size_t, int, StreamView) {}
void Communicator::all_gather(const std::byte*, std::byte*, std::size_t, StreamView) {}
void Communicator::exchange(std::span<const Transfer>, StreamView) {}
void Communicator::transfer(const Transfer&, StreamView) {}
void Communicator::meet_by(std::shared_ptr<Together>) {}
void Communicator::wait(StreamView) {}
void Communicator::fail() {}

#endif

}  // namespace gpu
