// Processes that started together find each other over TCP, tell each other small things, and fail together. No MPI is needed.
//
// Rank 0 listens; the others connect and prove by a secret that they belong to it. Where: at an address that all were given, or, on storage that all see, at what a
// file says that rank 0 writes (readable by its user only: host, addresses, port and a secret of its own making). Traffic is not encrypted: as with MPI and
// NCCL, the network between the hosts must be trusted.
#pragma once

#include "libshard/error.h"
#include "ranks/launch.h"

#include <atomic>
#include <chrono>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace ranks {

struct Place {
  std::string host;                   ///< "" : by `file`
  std::string port;
  std::string secret;                 ///< the same in every rank; not "" with an address, added to the file's own with a file
  std::filesystem::path file;
};

/// SHARDKIT_MASTER=HOST:PORT or MASTER_ADDR and MASTER_PORT, each with SHARDKIT_SECRET; else a file beside `near` (which all ranks see). Throws Usage for an
/// address that is none, and for SHARDKIT_MASTER without a secret. MASTER_ADDR without one, and a port that torchrun's agent holds, are passed over.
Place place_of(const Environment& environment, const Launch& launch, const std::filesystem::path& near);

/// Told once, where the others are long in coming: for whom, why, and until when.
using Waiting = std::function<void(const std::string&)>;

class Rendezvous {
 public:
  static constexpr std::size_t kMost = 64 << 20;  ///< bytes of one rank's text
  /// Returns when all ranks are here. Throws Io within `patience` where one is not: which, and what was seen instead.
  /// `stop`, set by a signal say, ends every waiting here.
  Rendezvous(const Launch& launch, const Place& place, std::chrono::milliseconds patience = std::chrono::seconds(60), const std::atomic<bool>* stop = nullptr, const Waiting& waiting = {});
  /// A rank that leaves without finish() fails the others.
  ~Rendezvous();
  Rendezvous(const Rendezvous&) = delete;
  Rendezvous& operator=(const Rendezvous&) = delete;
  int rank() const;
  int size() const;

  /// Every rank's text, by rank. Every rank must make the same calls in the same order. These wait as long as all ranks live, and throw another's
  /// failure with its own code: "rank 2: its text", or that it is gone.
  std::vector<std::string> all_gather(std::string_view mine);
  std::string broadcast(std::string_view text, int root = 0);
  void barrier() { all_gather(""); }
  /// The last call: all succeeded, and leaving is no failure from here on.
  void finish();

  /// Tells all ranks that this one failed. The first failure counts.
  void fail(const shard::Error& why);
  /// Set as soon as any rank failed or is gone: for loops that can be stopped.
  const std::atomic<bool>& failed() const;
  /// Called once, from another thread, when another rank failed; at once if one has.
  void on_failure(std::function<void()> call);
  /// Throws the failure, if there is one.
  void check() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace ranks
