// Sockets, and the frames that ranks exchange: kind and length, four bytes each, then the text.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace ranks {

class Socket {
 public:
  Socket() = default;
  explicit Socket(int fd) : fd_(fd) {}
  Socket(Socket&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Socket& operator=(Socket&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~Socket();
  int fd() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }

 private:
  int fd_ = -1;
};

enum class Kind : std::uint32_t { Hello = 1, Welcome, Refuse, Data, Fail, Bye };
struct Frame {
  Kind kind;
  std::string text;
};

/// What came of a connection and has not been taken apart yet.
struct Inbound {
  std::string bytes;
  std::size_t most;                    ///< longest text that is taken
  enum class State { Open, Closed, Broken } state = State::Open;
  /// Reads what is there, without waiting. Broken: a length over `most`, or a kind that is none.
  void pump(const Socket& from);
  std::optional<Frame> next();
};

/// All of it, waiting at most half a minute for room; false where the other end is gone.
bool send_frame(const Socket& to, Kind kind, std::string_view text);

/// Listens on `host`'s own address, on any where that is not this machine's; "" is any, and port "0" a free one. Throws Io.
Socket listen_on(const std::string& host, const std::string& port);
std::string port_of(const Socket& listener);
/// An accepted connection, if one waits.
Socket accept_one(const Socket& listener);
/// Within `patience`, else nothing and why.
Socket connect_to(const std::string& host, const std::string& port, std::chrono::milliseconds patience, std::string& why);

std::string host_name();
/// This machine's numeric addresses but for the loopback.
std::vector<std::string> own_addresses();

}  // namespace ranks
