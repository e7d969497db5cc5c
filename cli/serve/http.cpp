// libevent's evhttp: one thread for all connections, so that a slow or silent client holds a descriptor and nothing else.
#include "cli/serve/http.h"

#include "libshard/error.h"

#include <event2/buffer.h>
#include <event2/bufferevent.h>
#include <event2/event.h>
#include <event2/http.h>
#include <event2/keyvalq_struct.h>
#include <event2/listener.h>
#include <event2/thread.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <filesystem>
#include <list>
#include <mutex>
#include <optional>

#include <arpa/inet.h>
#include <poll.h>
#include <sys/resource.h>
#include <sys/socket.h>

namespace cli {
namespace {

using shard::Code;

constexpr int kTickMs = 50;
constexpr int kIdleSeconds = 10;               ///< without a byte in or out
constexpr ev_ssize_t kMostHeaders = 16 << 10, kMostBody = 1 << 20;
constexpr std::size_t kMostDescriptors = 4096, kSpareDescriptors = 256;

std::string header(evhttp_request* request, const char* name) {
  const char* value = evhttp_find_header(evhttp_request_get_input_headers(request), name);
  return value ? value : "";
}

/// The same time for every wrong guess of the same length.
bool same_secret(const std::string& a, const std::string& b) {
  unsigned char different = a.size() != b.size();
  for (std::size_t i = 0; i < a.size(); ++i) different |= static_cast<unsigned char>(a[i]) ^ static_cast<unsigned char>(b.empty() ? 0 : b[i % b.size()]);
  const volatile unsigned char out = different;
  return out == 0;
}

/// Without a token, a page from elsewhere must not reach this server through the user's browser: neither under a name of its
/// own that it lets point here, nor by a form.
bool local_name(const std::string& host) {
  const auto name = host.substr(0, host.rfind(':') == host.npos || host.back() == ']' ? host.npos : host.rfind(':'));
  in_addr v4{};  // "127.1" is an address, "127.example.org" a name like any other
  const bool digits = name.find_first_not_of("0123456789.") == name.npos;
  return host.empty() || name == "localhost" || name == "[::1]" || (digits && inet_aton(name.c_str(), &v4) == 1 && ntohl(v4.s_addr) >> 24 == 127);
}

std::string lower(std::string text) {
  for (auto& c : text)
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  return text;
}

/// Why a request without a token is refused; "" where it is not.
std::string not_local(const std::string& host, const std::string& origin) {
  if (!local_name(host)) return fmt::format("Host: '{}' is no local name; without a token only localhost and loopback addresses are served", host.substr(0, 200));
  if (origin.empty() || origin == "http://" + host) return "";
  return "request: comes from a page of another site; without a token only local ones are served";
}

/// The scheme's name has no case, the token has.
bool has_token(const std::string& authorization, const std::string& token) {
  constexpr std::size_t kScheme = sizeof "Bearer " - 1;
  return lower(authorization.substr(0, kScheme)) == "bearer " && same_secret(token, authorization.substr(kScheme));
}

const char* method_name(evhttp_cmd_type type) {
  switch (type) {
    case EVHTTP_REQ_GET: return "GET";
    case EVHTTP_REQ_HEAD: return "HEAD";
    case EVHTTP_REQ_POST: return "POST";
    default: return "other";
  }
}

std::size_t open_descriptors() {
  std::error_code error;
  std::size_t count = 0;
  for (std::filesystem::directory_iterator at("/proc/self/fd", error), end; !error && at != end; at.increment(error)) ++count;
  return count;
}

std::size_t most_descriptors() {
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return kMostDescriptors;
  const auto all = static_cast<std::size_t>(limit.rlim_cur);
  return std::min(kMostDescriptors, all > 2 * kSpareDescriptors ? all - kSpareDescriptors : all / 2);
}

}  // namespace

ListenAddress ListenAddress::parse(const std::string& text) {
  ListenAddress out;
  const auto colon = text.rfind(':');
  unsigned port = 65536;
  if (colon != text.npos) {
    const auto [end, error] = std::from_chars(text.data() + colon + 1, text.data() + text.size(), port);
    if (error != std::errc() || end != text.data() + text.size()) port = 65536;
    out.host = text.substr(0, colon);
  }
  if (out.host == "localhost") out.host = "127.0.0.1";
  if (out.host.size() > 2 && out.host.front() == '[' && out.host.back() == ']') out.host = out.host.substr(1, out.host.size() - 2);
  in_addr v4{};
  in6_addr v6{};
  const bool is_v4 = inet_pton(AF_INET, out.host.c_str(), &v4) == 1, is_v6 = inet_pton(AF_INET6, out.host.c_str(), &v6) == 1;
  shard::require(port < 65536 && (is_v4 || is_v6), Code::Usage, [&] { return fmt::format("--listen {}: should be an IP address and a port, as 127.0.0.1:8080 or [::1]:0", text); });
  out.port = static_cast<std::uint16_t>(port);
  out.loopback = (is_v4 && (ntohl(v4.s_addr) >> 24) == 127) || (is_v6 && IN6_IS_ADDR_LOOPBACK(&v6));
  return out;
}

struct HttpServer::Impl {
  /// Where a reply waits for the server's thread; outlives the server for workers that answer late.
  struct Mailbox {
    std::mutex mutex;
    event* wake = nullptr;
    bool any = false;
  };
  struct Waiting final : Pending {
    std::shared_ptr<Mailbox> mailbox;
    evhttp_request* request = nullptr;
    std::optional<HttpReply> reply;
    bool gone = false;
    void answer(HttpReply given) override {
      const std::lock_guard lock(mailbox->mutex);
      if (reply) return;
      reply = std::move(given);
      mailbox->any = true;
      if (mailbox->wake) event_active(mailbox->wake, 0, 0);
    }
  };

  HttpOptions options;
  Handler handler;
  std::unique_ptr<event_base, decltype(&event_base_free)> base{nullptr, event_base_free};
  std::unique_ptr<evhttp, decltype(&evhttp_free)> http{nullptr, evhttp_free};
  std::unique_ptr<event, decltype(&event_free)> wake{nullptr, event_free}, timer{nullptr, event_free};
  evhttp_bound_socket* bound = nullptr;
  bool listening = true, stopped = false;
  std::uint16_t port = 0;
  std::shared_ptr<Mailbox> mailbox = std::make_shared<Mailbox>();
  std::list<std::shared_ptr<Waiting>> waiting;
  std::function<void()> on_tick;
  unsigned ticks = 0;
  std::size_t descriptor_limit = most_descriptors();

  Impl(HttpOptions given, Handler handle) : options(std::move(given)), handler(std::move(handle)) {
    evthread_use_pthreads();
    base.reset(event_base_new());
    http.reset(base ? evhttp_new(base.get()) : nullptr);
    shard::require(http != nullptr, Code::Io, [] { return "serve: the system gives no event loop"; });
    evhttp_set_timeout(http.get(), kIdleSeconds);
    evhttp_set_max_headers_size(http.get(), kMostHeaders);
    evhttp_set_max_body_size(http.get(), kMostBody);
    evhttp_set_allowed_methods(http.get(), EVHTTP_REQ_GET | EVHTTP_REQ_HEAD | EVHTTP_REQ_POST | EVHTTP_REQ_PUT | EVHTTP_REQ_DELETE | EVHTTP_REQ_OPTIONS | EVHTTP_REQ_PATCH);
    evhttp_set_default_content_type(http.get(), "application/json");
    evhttp_set_gencb(http.get(), [](evhttp_request* request, void* self) { static_cast<Impl*>(self)->handle(request); }, this);
    bound = evhttp_bind_socket_with_handle(http.get(), options.listen.host.c_str(), options.listen.port);
    shard::require(bound != nullptr, Code::Io, [&] { return fmt::format("--listen {}:{}: cannot be had: {}", options.listen.host, options.listen.port, std::strerror(errno)); });
    sockaddr_storage address{};
    socklen_t length = sizeof address;
    getsockname(evhttp_bound_socket_get_fd(bound), reinterpret_cast<sockaddr*>(&address), &length);
    port = ntohs(address.ss_family == AF_INET6 ? reinterpret_cast<sockaddr_in6&>(address).sin6_port : reinterpret_cast<sockaddr_in&>(address).sin_port);
    wake.reset(event_new(base.get(), -1, EV_PERSIST, [](evutil_socket_t, short, void* self) { static_cast<Impl*>(self)->deliver(); }, this));
    timer.reset(event_new(base.get(), -1, EV_PERSIST, [](evutil_socket_t, short, void* self) { static_cast<Impl*>(self)->tick(); }, this));
    mailbox->wake = wake.get();
    const timeval every{0, kTickMs * 1000};
    event_add(timer.get(), &every);
  }
  ~Impl() {
    const std::lock_guard lock(mailbox->mutex);
    mailbox->wake = nullptr;
  }

  void send(evhttp_request* request, const HttpReply& reply) {
    auto* headers = evhttp_request_get_output_headers(request);
    evhttp_add_header(headers, "Content-Type", reply.type.c_str());
    evhttp_add_header(headers, "X-Content-Type-Options", "nosniff");
    evhttp_add_header(headers, "Cache-Control", "no-store");
    for (const auto& [key, value] : reply.headers) evhttp_add_header(headers, key.c_str(), value.c_str());
    if (stopped) evhttp_add_header(headers, "Connection", "close");
    auto* body = evbuffer_new();
    // evhttp sends a body after HEAD as well, which the client would take for the next answer.
    if (evhttp_request_get_command(request) == EVHTTP_REQ_HEAD) evhttp_add_header(headers, "Content-Length", std::to_string(reply.body.size()).c_str());
    else evbuffer_add(body, reply.body.data(), reply.body.size());
    evhttp_send_reply(request, reply.status, nullptr, body);
    evbuffer_free(body);
    options.sent(reply.status);
  }

  void handle(evhttp_request* request) {
    HttpRequest in;
    in.method = method_name(evhttp_request_get_command(request));
    const auto* uri = evhttp_request_get_evhttp_uri(request);
    const char* path = uri ? evhttp_uri_get_path(uri) : nullptr;
    in.path = path && *path ? path : "/";
    if (options.token.empty()) {
      if (const auto why = not_local(lower(header(request, "Host")), lower(header(request, "Origin"))); !why.empty()) return send(request, options.refuse(403, why));
    } else if (in.path != options.open_path && !has_token(header(request, "Authorization"), options.token)) {
      auto reply = options.refuse(401, "Authorization: should be Bearer and the server's token");
      reply.headers.emplace_back("WWW-Authenticate", "Bearer");
      return send(request, reply);
    }
    auto* buffer = evhttp_request_get_input_buffer(request);
    in.body.resize(evbuffer_get_length(buffer));
    evbuffer_remove(buffer, in.body.data(), in.body.size());
    const auto pending = std::make_shared<Waiting>();
    pending->mailbox = mailbox;
    pending->request = request;
    waiting.push_back(pending);
    try {
      handler(in, pending);
    } catch (const std::exception& error) {
      pending->answer(options.refuse(500, error.what()));
    }
  }

  /// Sends the replies that have come.
  void deliver() {
    std::list<std::shared_ptr<Waiting>> ready;
    {
      const std::lock_guard lock(mailbox->mutex);
      mailbox->any = false;
      for (auto at = waiting.begin(); at != waiting.end();) {
        const auto here = at++;
        if ((*here)->reply) ready.splice(ready.end(), waiting, here);
      }
    }
    for (const auto& one : ready) send(one->request, *one->reply);
  }

  /// evhttp does not read while a reply is awaited, so it does not see that the client left; the socket knows.
  void look_for_gone() {
    for (const auto& one : waiting) {
      if (one->gone) continue;
      auto* connection = evhttp_request_get_connection(one->request);
      auto* stream = connection ? evhttp_connection_get_bufferevent(connection) : nullptr;
      pollfd fd{stream ? bufferevent_getfd(stream) : -1, POLLRDHUP, 0};
      one->gone = fd.fd < 0 || (poll(&fd, 1, 0) > 0 && fd.revents & (POLLRDHUP | POLLHUP | POLLERR | POLLNVAL));
      if (one->gone && one->on_gone) one->on_gone();
    }
  }

  /// With no descriptors left accept() would fail in a busy loop, and checkpoints could not be opened.
  void keep_descriptors() {
    const bool room = open_descriptors() < descriptor_limit;
    if (room == listening) return;
    listening = room;
    auto* listener = evhttp_bound_socket_get_listener(bound);
    if (room) evconnlistener_enable(listener);
    else evconnlistener_disable(listener);
  }

  void tick() {
    deliver();
    look_for_gone();
    if (!stopped && ++ticks % 4 == 0) keep_descriptors();
    if (on_tick) on_tick();
  }
};

HttpServer::HttpServer(HttpOptions options, Handler handler) : impl_(std::make_unique<Impl>(std::move(options), std::move(handler))) {}
HttpServer::~HttpServer() = default;

std::string HttpServer::url() const {
  const auto& host = impl_->options.listen.host;
  const bool v6 = host.find(':') != host.npos;
  return fmt::format("http://{}{}{}:{}", v6 ? "[" : "", host, v6 ? "]" : "", impl_->port);
}

void HttpServer::run(const std::atomic<bool>& stop, const std::function<void()>& stopping, const std::function<void()>& tick, int grace) {
  auto& s = *impl_;
  std::chrono::steady_clock::time_point end{};
  int after = 0;
  s.on_tick = [&] {
    tick();
    if (!stop) return;
    if (!s.stopped) {
      s.stopped = true;
      evhttp_del_accept_socket(s.http.get(), s.bound);
      end = std::chrono::steady_clock::now() + std::chrono::seconds(grace);
      stopping();
    }
    // A few ticks more for the last bytes to leave.
    if (s.waiting.empty() ? ++after > 3 : std::chrono::steady_clock::now() > end) event_base_loopbreak(s.base.get());
  };
  event_base_dispatch(s.base.get());
  s.on_tick = nullptr;
}

}  // namespace cli
