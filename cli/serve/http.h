// HTTP for the resident server: who may connect, limits, and replies that come later from another thread.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace cli {

struct HttpRequest {
  std::string method, path, body;
};

struct HttpReply {
  int status = 200;
  std::string type, body;
  std::vector<std::pair<std::string, std::string>> headers;
};

/// A request that waits for its reply.
class Pending {
 public:
  virtual ~Pending() = default;
  /// From any thread; the first call counts.
  virtual void answer(HttpReply reply) = 0;
  /// Called on the server's thread when the client hangs up before the reply. To be set while the request is handled.
  std::function<void()> on_gone;
};

/// "127.0.0.1:8080", "[::1]:0", "localhost:8080".
struct ListenAddress {
  std::string host;
  std::uint16_t port = 0;
  bool loopback = false;
  /// Throws Usage for what is no IP address with a port.
  static ListenAddress parse(const std::string& text);
};

struct HttpOptions {
  ListenAddress listen;
  std::string token;                           ///< asked for everywhere but on `open_path`; "": none
  std::string open_path = "/health";
  std::function<HttpReply(int status, const std::string& error)> refuse;  ///< how an error looks
  std::function<void(int status)> sent;        ///< sees every reply
};

class HttpServer {
 public:
  using Handler = std::function<void(const HttpRequest&, const std::shared_ptr<Pending>&)>;
  /// Listens at once. Throws Io where the address cannot be had.
  HttpServer(HttpOptions options, Handler handler);
  ~HttpServer();
  std::string url() const;
  /// Serves until `stop` is set; then takes no more connections, calls `stopping` once and goes on for at most `grace`
  /// seconds until what waits is answered. `tick` is called several times a second.
  void run(const std::atomic<bool>& stop, const std::function<void()>& stopping, const std::function<void()>& tick, int grace);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace cli
