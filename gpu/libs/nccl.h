// Ranks of one process or of many, each with its device, through NCCL. How they find each other is not its business: rank 0 makes an id
// and the others must be given it (ranks/rendezvous.h brings it to other processes).
#pragma once

#include "gpu/runtime.h"
#include "libshard/dtype.h"

#include <array>
#include <memory>
#include <span>
#include <string>

namespace gpu {

/// Bytes of device memory that a communicator takes, as far as documents say: a buffer of 4 MiB (NCCL_BUFFSIZE) each way for each of 32 channels.
constexpr std::size_t kNcclBuffers = std::size_t{2 * 32 * 4} << 20;

/// The library, loaded. Throws Error{Device} where it is absent or older than 2.18.
class Nccl {
 public:
  explicit Nccl(const std::string& path = "");
  using Id = std::array<char, 128>;
  Id make_id() const;
  const std::string& version() const;                ///< "2.28.9"

 private:
  friend class Communicator;
  struct Api;
  std::shared_ptr<const Api> api_;
};

enum class Reduction { Sum, Max };

/// Where ranks are threads of one process: how they wait for each other on the host. CUDA may hold an allocation back until all devices that see each
/// other's memory are idle; a rank that allocates while another's kernel already waits for it would then wait for ever. So ranks come together before a
/// call and part when all have made it: from there on what runs on the devices ends by itself. Both throw where a rank failed.
class Together {
 public:
  virtual ~Together() = default;
  virtual void all() = 0;
  virtual void pair(int peer) = 0;
};

/// One rank's end. What is called returns when it is in the stream; all ranks must call the same in the same order. The calls can be recorded
/// in a Graph. A rank that fails must call fail() on its communicator, as must every rank that hears of it: NCCL itself notices a dead
/// process only over a network, and all others would wait for ever. An error that NCCL tells of ends what runs before it is thrown.
class Communicator {
 public:
  /// Waits for all `size` ranks to come; `device` is made current.
  Communicator(const Nccl& library, const Nccl::Id& id, int rank, int size, int device, std::shared_ptr<Together> together = nullptr);
  ~Communicator();
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;
  int rank() const;
  int size() const;

  /// In place; f32, bf16, f16. The order of a sum is NCCL's: equal from run to run on the same devices, not equal to the host's.
  void all_reduce(std::byte* values, std::size_t count, shard::DType type, Reduction reduction, StreamView on);
  void broadcast(std::byte* bytes, std::size_t count, int root, StreamView on);
  /// `count` bytes of every rank, in rank order; `mine` may lie at its place in `all`.
  void all_gather(const std::byte* mine, std::byte* all, std::size_t count, StreamView on);
  struct Transfer {
    enum class Way { Send, Receive } way;
    int peer;
    std::byte* memory;                               ///< a send only reads it
    std::size_t bytes;
  };
  /// All of them at once: sends and receives between two ranks pair up in order. All ranks call it, also those without any.
  void exchange(std::span<const Transfer> transfers, StreamView on);
  /// Between this rank and one other.
  void transfer(const Transfer& one, StreamView on);
  /// In place of what it was made with, of another run: its ranks are other threads.
  void meet_by(std::shared_ptr<Together> together);

  /// Until the stream's work is done; throws what failed in it, here or in fail().
  void wait(StreamView on);
  /// From any thread: ends what runs; every later call throws.
  void fail();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// What a rank tells the others before they choose how to talk.
struct RankDevice {
  std::string board;                                 ///< DeviceInfo::id
  std::string nccl;                                  ///< its version; "" where there is none
  std::string why_no_nccl;
};
struct Transport {
  bool nccl;                                         ///< else through the host's memory
  std::string why;                                   ///< one clause
};
/// The same answer in every rank, since all see the same list.
Transport choose_transport(std::span<const RankDevice> ranks);

}  // namespace gpu
