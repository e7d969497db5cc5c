// How the ranks' connections come about; ranks/rendezvous.cpp talks over them.
#pragma once

#include "ranks/rendezvous.h"
#include "ranks/socket.h"

#include <vector>

namespace ranks {

struct Connection {
  Socket socket;
  std::string early;                   ///< what came behind the welcome already
};
/// In rank 0 one connection a rank (its own place is empty); in the others the one to rank 0. All ranks are here.
std::vector<Connection> join(const Launch& launch, const Place& place, std::chrono::milliseconds patience, const std::atomic<bool>* stop, const Waiting& waiting);

}  // namespace ranks
