// POSIX sockets; a peer whose machine dies is noticed by keepalive within half a minute.
#include "ranks/socket.h"

#include "libshard/error.h"

#include <fcntl.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <memory>

namespace ranks {
namespace {

using Addresses = std::unique_ptr<addrinfo, decltype(&::freeaddrinfo)>;

Addresses resolve(const std::string& host, const std::string& port, bool to_listen, std::string& why) {
  addrinfo hints{}, *found = nullptr;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = to_listen ? AI_PASSIVE : 0;
  if (const int status = ::getaddrinfo(host.empty() ? nullptr : host.c_str(), port.c_str(), &hints, &found); status != 0) why = ::gai_strerror(status);
  return {found, ::freeaddrinfo};
}

void set(const Socket& socket, int level, int option, int value) { ::setsockopt(socket.fd(), level, option, &value, sizeof value); }

void set_up(const Socket& socket) {
  set(socket, SOL_SOCKET, SO_KEEPALIVE, 1);
  set(socket, IPPROTO_TCP, TCP_KEEPIDLE, 10);
  set(socket, IPPROTO_TCP, TCP_KEEPINTVL, 5);
  set(socket, IPPROTO_TCP, TCP_KEEPCNT, 3);
  set(socket, IPPROTO_TCP, TCP_USER_TIMEOUT, 30'000);
  set(socket, IPPROTO_TCP, TCP_NODELAY, 1);
  const timeval room{30, 0};
  ::setsockopt(socket.fd(), SOL_SOCKET, SO_SNDTIMEO, &room, sizeof room);
}

std::string text_of(const sockaddr* address, socklen_t length, bool port) {
  char host[NI_MAXHOST], service[NI_MAXSERV];
  if (::getnameinfo(address, length, host, sizeof host, service, sizeof service, NI_NUMERICHOST | NI_NUMERICSERV) != 0) return "";
  return port ? service : host;
}

constexpr std::size_t kHeader = 8;

}  // namespace

Socket::~Socket() {
  if (fd_ >= 0) ::close(fd_);
}

void Inbound::pump(const Socket& from) {
  char block[1 << 16];
  while (state == State::Open) {
    const auto got = ::recv(from.fd(), block, sizeof block, MSG_DONTWAIT);
    if (got > 0) bytes.append(block, static_cast<std::size_t>(got));
    else if (got < 0 && errno == EINTR) continue;
    else if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return;
    else state = State::Closed;
    if (bytes.size() > kHeader + most) return;  // the rest when this is taken
  }
}

std::optional<Frame> Inbound::next() {
  if (bytes.size() < kHeader || state == State::Broken) return std::nullopt;
  std::uint32_t head[2];
  std::memcpy(head, bytes.data(), kHeader);
  if (head[0] < 1 || head[0] > static_cast<std::uint32_t>(Kind::Bye) || head[1] > most) {
    state = State::Broken;
    return std::nullopt;
  }
  if (bytes.size() < kHeader + head[1]) return std::nullopt;
  Frame out{static_cast<Kind>(head[0]), bytes.substr(kHeader, head[1])};
  bytes.erase(0, kHeader + head[1]);
  return out;
}

bool send_frame(const Socket& to, Kind kind, std::string_view text) {
  const std::uint32_t head[2] = {static_cast<std::uint32_t>(kind), static_cast<std::uint32_t>(text.size())};
  std::string all(reinterpret_cast<const char*>(head), kHeader);
  all += text;
  for (std::size_t at = 0; at < all.size();) {
    const auto sent = ::send(to.fd(), all.data() + at, all.size() - at, MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    if (sent <= 0) return false;
    at += static_cast<std::size_t>(sent);
  }
  return true;
}

Socket listen_on(const std::string& host, const std::string& port) {
  std::string why = "no address";
  const auto addresses = resolve(host, port, true, why);
  for (const auto* a = addresses.get(); a; a = a->ai_next) {
    Socket out(::socket(a->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    if (!out) continue;
    set(out, SOL_SOCKET, SO_REUSEADDR, 1);
    if (a->ai_family == AF_INET6 && host.empty()) set(out, IPPROTO_IPV6, IPV6_V6ONLY, 0);
    if (::bind(out.fd(), a->ai_addr, a->ai_addrlen) == 0 && ::listen(out.fd(), 128) == 0) return out;
    if (errno == EADDRNOTAVAIL && !host.empty()) return listen_on("", port);  // the name of a gateway, say
    why = std::strerror(errno);
  }
  shard::fail(shard::Code::Io, "{}:{}: cannot listen there: {}", host.empty() ? "any address" : host, port, why);
}

std::string port_of(const Socket& listener) {
  sockaddr_storage address{};
  socklen_t length = sizeof address;
  ::getsockname(listener.fd(), reinterpret_cast<sockaddr*>(&address), &length);
  return text_of(reinterpret_cast<sockaddr*>(&address), length, true);
}

Socket accept_one(const Socket& listener) {
  Socket out(::accept4(listener.fd(), nullptr, nullptr, SOCK_CLOEXEC));
  if (out) set_up(out);
  return out;
}

Socket connect_to(const std::string& host, const std::string& port, std::chrono::milliseconds patience, std::string& why) {
  const auto addresses = resolve(host, port, false, why);
  for (const auto* a = addresses.get(); a; a = a->ai_next) {
    Socket out(::socket(a->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    if (!out) continue;
    int error = ::connect(out.fd(), a->ai_addr, a->ai_addrlen) == 0 ? 0 : errno;
    if (error == EINPROGRESS) {
      pollfd one{out.fd(), POLLOUT, 0};
      socklen_t length = sizeof error;
      if (::poll(&one, 1, static_cast<int>(patience.count())) <= 0) error = ETIMEDOUT;
      else ::getsockopt(out.fd(), SOL_SOCKET, SO_ERROR, &error, &length);
    }
    if (error == 0) {
      ::fcntl(out.fd(), F_SETFL, ::fcntl(out.fd(), F_GETFL) & ~O_NONBLOCK);
      set_up(out);
      return out;
    }
    why = std::strerror(error);
  }
  return {};
}

std::string host_name() {
  char name[256] = "";
  ::gethostname(name, sizeof name - 1);
  return name;
}

std::vector<std::string> own_addresses() {
  std::vector<std::string> out;
  ifaddrs* all = nullptr;
  if (::getifaddrs(&all) != 0) return out;
  const std::unique_ptr<ifaddrs, decltype(&::freeifaddrs)> owner(all, ::freeifaddrs);
  for (const auto* a = all; a; a = a->ifa_next) {
    if (!a->ifa_addr || a->ifa_flags & IFF_LOOPBACK || !(a->ifa_flags & IFF_UP)) continue;
    const auto family = a->ifa_addr->sa_family;
    if (family != AF_INET && family != AF_INET6) continue;
    const auto text = text_of(a->ifa_addr, family == AF_INET ? sizeof(sockaddr_in) : sizeof(sockaddr_in6), false);
    if (!text.empty() && text.find('%') == text.npos) out.push_back(text);  // a link-local address means nothing elsewhere
  }
  return out;
}

}  // namespace ranks
