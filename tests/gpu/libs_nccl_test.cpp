// Ranks through NCCL, as threads and as processes; which way ranks should talk.
#include "gpu/libs/nccl.h"
#include "libshard/error.h"
#include "libshard/numeric.h"
#include "tests/gpu/libraries.h"

#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <functional>
#include <thread>
#include <vector>

using shard::DType;

TEST_CASE("ranks talk over NCCL only where each has a board of its own and the same library") {
  const auto choose = [](std::vector<gpu::RankDevice> ranks) { return gpu::choose_transport(ranks); };
  CHECK(choose({{"GPU-a", "2.28.9", ""}, {"GPU-b", "2.28.9", ""}}).nccl);
  CHECK(choose({{"GPU-a", "2.28.9", ""}}).why == "there is one rank");
  const auto shared = choose({{"GPU-a", "2.28.9", ""}, {"GPU-b", "2.28.9", ""}, {"GPU-a", "2.28.9", ""}});
  CHECK(!shared.nccl);
  CHECK(shared.why == "ranks 0 and 2 share GPU-a, and NCCL takes one rank a device");
  CHECK(choose({{"GPU-a", "2.28.9", ""}, {"GPU-b", "", "NCCL: could not be loaded"}}).why == "rank 1 has no NCCL (NCCL: could not be loaded)");
  CHECK(choose({{"GPU-a", "2.28.9", ""}, {"GPU-b", "2.18.1", ""}}).why == "rank 0 has NCCL 2.28.9, rank 1 has 2.18.1");
}

#ifdef SHARDKIT_LIBRARIES

namespace {

using Values = std::vector<float>;

gpu::DeviceBuffer put(const Values& values, DType type, gpu::StreamView on) {
  std::vector<std::byte> bytes(values.size() * size_of(type));
  shard::cast(std::as_bytes(std::span(values)), DType::F32, bytes, type);
  gpu::DeviceBuffer out(bytes.size());
  gpu::to_device(out.data(), bytes.data(), bytes.size(), on);
  gpu::wait(on);
  return out;
}
Values get(const gpu::DeviceBuffer& from, DType type, gpu::StreamView on) {
  std::vector<std::byte> bytes(from.size());
  gpu::to_host(bytes.data(), from.data(), bytes.size(), on);
  gpu::wait(on);
  Values out(bytes.size() / size_of(type));
  shard::cast(bytes, type, std::as_writable_bytes(std::span(out)), DType::F32);
  return out;
}

/// The ranks of threads: a device each, and the host plays as many as are wanted.
#ifdef SHARDKIT_ON_DEVICE
const std::vector<int> kRanks = [] {
  std::vector<int> out{1};
  if (const auto devices = gpu::probe().devices.size(); devices > 1) out.push_back(static_cast<int>(devices));
  return out;
}();
int device_of(int rank) { return rank; }
#else
constexpr int kRanks[] = {1, 3};
int device_of(int) { return 0; }
#endif

/// What a rank found wrong; doctest's own checks are for the main thread.
using Body = std::function<std::string(gpu::Communicator& comm)>;

std::string guarded(const gpu::Nccl& nccl, const gpu::Nccl::Id& id, int rank, int size, const Body& body) {
  try {
    gpu::Communicator comm(nccl, id, rank, size, device_of(rank));
    return body(comm);
  } catch (const std::exception& error) {
    return error.what();
  }
}

std::vector<std::string> as_threads(int size, const Body& body) {
  const gpu::Nccl nccl(libraries::nccl());
  const auto id = nccl.make_id();
  std::vector<std::string> out(static_cast<std::size_t>(size));
  std::vector<std::thread> threads;
  for (int r = 0; r < size; ++r) threads.emplace_back([&, r] { out[static_cast<std::size_t>(r)] = guarded(nccl, id, r, size, body); });
  for (auto& thread : threads) thread.join();
  return out;
}

#ifndef SHARDKIT_ON_DEVICE
std::vector<std::string> as_processes(int size, const Body& body) {
  const gpu::Nccl nccl(libraries::nccl());
  const auto id = nccl.make_id();
  std::vector<std::string> out;
  std::vector<std::pair<pid_t, int>> children;
  for (int r = 0; r < size; ++r) {
    int pipe[2];
    REQUIRE(::pipe(pipe) == 0);
    const auto child = ::fork();
    if (child == 0) {
      const auto said = guarded(nccl, id, r, size, body);
      _exit(::write(pipe[1], said.data(), said.size()) < 0);
    }
    ::close(pipe[1]);
    children.emplace_back(child, pipe[0]);
  }
  for (const auto& [child, end] : children) {
    char text[4096];
    const auto got = ::read(end, text, sizeof text);
    out.emplace_back(text, static_cast<std::size_t>(std::max<ssize_t>(got, 0)));
    ::close(end);
    ::waitpid(child, nullptr, 0);
  }
  return out;
}
#endif

/// Every collective with payloads of one chunk and of several, each rank's numbers its own.
std::string talk(gpu::Communicator& comm) {
  gpu::Stream stream;
  const auto n = comm.size(), me = comm.rank();
  std::string wrong;
  const auto same = [&](const char* what, const Values& is, const Values& should) {
    if (is != should) wrong += fmt::format("{} ", what);
  };
  for (const std::size_t count : {3u, 5000u}) {
    const auto numbers = [&](int rank) {
      Values out(count);
      for (std::size_t i = 0; i < count; ++i) out[i] = static_cast<float>(static_cast<int>(i % 50) * (rank + 1) - 60);
      return out;
    };
    for (const auto type : {DType::F32, DType::BF16, DType::F16})
      for (const auto reduction : {gpu::Reduction::Sum, gpu::Reduction::Max}) {
        const auto memory = put(numbers(me), type, stream);
        Values want = numbers(0);
        for (int r = 1; r < n; ++r)
          for (std::size_t i = 0; i < count; ++i) want[i] = reduction == gpu::Reduction::Sum ? want[i] + numbers(r)[i] : std::max(want[i], numbers(r)[i]);
        comm.all_reduce(memory.data(), count, type, reduction, stream);
        comm.wait(stream);
        const gpu::DeviceBuffer rounded = put(want, type, stream);
        same("all-reduce", get(memory, type, stream), get(rounded, type, stream));
      }
    const auto memory = put(numbers(me), DType::F32, stream);
    comm.broadcast(memory.data(), memory.size(), n - 1, stream);
    comm.wait(stream);
    same("broadcast", get(memory, DType::F32, stream), numbers(n - 1));
    const auto mine = put(numbers(me), DType::F32, stream);
    const gpu::DeviceBuffer all(mine.size() * static_cast<std::size_t>(n));
    comm.all_gather(mine.data(), all.data(), mine.size(), stream);
    comm.wait(stream);
    Values want;
    for (int r = 0; r < n; ++r) {
      const auto part = numbers(r);
      want.insert(want.end(), part.begin(), part.end());
    }
    same("all-gather", get(all, DType::F32, stream), want);
    // Everyone sends everyone (itself as well) two messages, in one group.
    std::vector<gpu::DeviceBuffer> sent, received;
    std::vector<gpu::Communicator::Transfer> transfers;
    using Way = gpu::Communicator::Transfer::Way;
    for (int r = 0; r < n; ++r)
      for (int turn = 0; turn < 2; ++turn) {
        sent.push_back(put(numbers(10 * me + r + 100 * turn), DType::F32, stream));
        received.emplace_back(count * 4);
        transfers.push_back({Way::Send, r, sent.back().data(), sent.back().size()});
        transfers.push_back({Way::Receive, r, received.back().data(), received.back().size()});
      }
    comm.exchange(transfers, stream);
    comm.wait(stream);
    for (int r = 0; r < n; ++r)
      for (int turn = 0; turn < 2; ++turn) same("exchange", get(received[static_cast<std::size_t>(2 * r + turn)], DType::F32, stream), numbers(10 * r + me + 100 * turn));
  }
  return wrong;
}

}  // namespace

TEST_CASE("collectives and exchanges among threads and among processes") {
  for (const int ranks : kRanks) CHECK(as_threads(ranks, talk) == std::vector<std::string>(static_cast<std::size_t>(ranks)));
#ifndef SHARDKIT_ON_DEVICE  // a forked process has no devices
  for (const int ranks : {2, 4}) CHECK(as_processes(ranks, talk) == std::vector<std::string>(static_cast<std::size_t>(ranks)));
#endif
}

#ifndef SHARDKIT_ON_DEVICE  // several ranks

TEST_CASE("a recorded all-reduce") {
  const auto said = as_threads(2, [](gpu::Communicator& comm) -> std::string {
    gpu::Stream stream;
    const auto memory = put({1.0f + static_cast<float>(comm.rank())}, DType::F32, stream);
    gpu::Graph::begin(stream);
    comm.all_reduce(memory.data(), 1, DType::F32, gpu::Reduction::Sum, stream);
    const auto graph = gpu::Graph::end(stream);
    graph.launch(stream);
    graph.launch(stream);
    comm.wait(stream);
    return get(memory, DType::F32, stream) == Values{6} ? "" : "wrong";
  });
  CHECK(said == std::vector<std::string>(2));
}

TEST_CASE("errors carry NCCL's words, and a rank that fails frees the others") {
  const auto path = libraries::nccl();
  const gpu::Nccl nccl(path);
  CHECK(nccl.version() == "2.28.9");
  const auto title = fmt::format("NCCL ({}): ", path);
  CHECK_THROWS_WITH_AS(gpu::Communicator(nccl, nccl.make_id(), 2, 2, 0), (title + "rank 2 of 2 joins: invalid argument; rank 2 of 2").c_str(), shard::Error);

  std::array<gpu::Communicator*, 3> comms;
  const auto said = as_threads(3, [&](gpu::Communicator& comm) -> std::string {
    gpu::Stream stream;
    const auto memory = put({1}, DType::F32, stream);
    comms[static_cast<std::size_t>(comm.rank())] = &comm;
    comm.broadcast(memory.data(), 1, 0, stream);
    comm.wait(stream);
    if (comm.rank() == 1) {  // whose own work threw
      for (auto* one : comms) one->fail();
      return "";
    }
    comm.all_reduce(memory.data(), 1, DType::F32, gpu::Reduction::Sum, stream);
    comm.wait(stream);
    return "went on";
  });
  CHECK(said[1].empty());
  for (const int r : {0, 2}) CHECK(said[static_cast<std::size_t>(r)] == fmt::format("{}rank {}: another rank failed", title, r));

  const auto after = as_threads(1, [&](gpu::Communicator& comm) -> std::string {
    gpu::Stream stream;
    comm.fail();
    comm.all_reduce(nullptr, 1, DType::F32, gpu::Reduction::Sum, stream);
    return "went on";
  });
  CHECK(after[0] == title + "rank 0: another rank failed");

  const auto unequal = as_threads(2, [&](gpu::Communicator& comm) -> std::string {
    gpu::Stream stream;
    const auto memory = put({1, 2, 3}, DType::F32, stream);
    const gpu::Communicator::Transfer one{comm.rank() ? gpu::Communicator::Transfer::Way::Receive : gpu::Communicator::Transfer::Way::Send, 1 - comm.rank(), memory.data(), comm.rank() ? 8u : 12u};
    comm.exchange(std::span(&one, 1), stream);
    comm.wait(stream);
    return "went on";
  });
  CHECK(unequal[1] == title + "running: invalid usage");
  CHECK(as_threads(1, [](gpu::Communicator& comm) -> std::string {
          gpu::Stream stream;
          comm.all_reduce(nullptr, 1, DType::I32, gpu::Reduction::Sum, stream);
          return "went on";
        })[0] == "NCCL: i32 is no type of a reduction here; f32, bf16 and f16 are");
}

#endif

#endif
