// What the code above kernels needs of a device: memory, streams, events, graphs, copies. gpu/cuda implements it for CUDA; gpu/emulated
// runs the same kernels on the host, so that all but speed is tested where no device is. Errors are Error{Device}.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace gpu {

struct DeviceInfo {
  int index = 0;
  std::string name;
  int major = 0, minor = 0;                    ///< compute capability
  int multiprocessors = 0;
  std::uint64_t memory = 0, free = 0;          ///< bytes; `free` is 0 as probe() gives it
  std::string id;                              ///< the board's own, "GPU-…": equal in every process that sees it
};

/// The devices that can run this build's kernels; never throws and never loads more than the driver.
struct Probe {
  std::vector<DeviceInfo> devices;
  std::string why;                             ///< where there are none: one clause
  std::map<int, std::string> refused;          ///< those that are there and cannot, by index: one clause
};
Probe probe();
/// Whether the host plays the device.
bool is_emulated();

/// Makes a device the calling thread's: everything below happens there.
void use_device(int index);
DeviceInfo device_info(int index);
/// Whether the current device has the products of gpu/warpgroup.h, and this build the code for them.
bool has_warpgroups();

/// An in-order queue of work. A view neither owns nor ends it.
struct StreamView {
  void* handle = nullptr;
};
class Stream {
 public:
  Stream();
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  operator StreamView() const { return {handle_}; }
  /// Until all of its work is done; throws what failed in it.
  void wait() const;

 private:
  void* handle_;
};
void wait(StreamView stream);
/// Whether its work is done, without waiting for it; throws what failed in it.
bool done(StreamView stream);

/// A point in a stream's work.
class Event {
 public:
  Event();
  ~Event();
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  void record(StreamView on);
  /// `stream` goes on only behind the recorded point.
  void hold(StreamView stream) const;
  /// The calling thread waits for it.
  void wait() const;
  /// Milliseconds from `start` to this one; both done.
  float since(const Event& start) const;

 private:
  void* handle_;
};

/// Memory of the current device, not zeroed. Out of memory names the size that was asked for and what is free.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  explicit DeviceBuffer(std::size_t bytes);
  std::byte* data() const { return memory_.get(); }
  std::size_t size() const { return size_; }
  explicit operator bool() const { return memory_ != nullptr; }

 private:
  std::shared_ptr<std::byte> memory_;
  std::size_t size_ = 0;
};

/// Memory of the host that devices reach at full speed.
class PinnedBuffer {
 public:
  PinnedBuffer() = default;
  explicit PinnedBuffer(std::size_t bytes);
  std::byte* data() const { return memory_.get(); }
  std::size_t size() const { return size_; }

 private:
  std::shared_ptr<std::byte> memory_;
  std::size_t size_ = 0;
};

/// All in the stream's order; host memory must stay as it is until the stream got there.
void to_device(std::byte* to, const void* from, std::size_t bytes, StreamView on);
void to_host(void* to, const std::byte* from, std::size_t bytes, StreamView on);
void on_device(std::byte* to, const std::byte* from, std::size_t bytes, StreamView on);
void set_bytes(std::byte* to, int value, std::size_t bytes, StreamView on);

/// Work that was recorded once and is launched whole.
class Graph {
 public:
  Graph() = default;
  /// From here on work given to `on` (and streams that wait for its events) is recorded, not done.
  static void begin(StreamView on);
  /// Ends the recording.
  static Graph end(StreamView on);
  void launch(StreamView on) const;
  explicit operator bool() const { return handle_ != nullptr; }

 private:
  std::shared_ptr<void> handle_;
};

}  // namespace gpu
