// The runtime without a device. Streams are lazy – work is done when something waits for it – and a device's memory is closed to everything
// but its own work, so that a missing wait and an access from the host or another device show.
#include "gpu/runtime.h"

#include "gpu/emulated/device.h"
#include "gpu/kernel.h"

#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <deque>
#include <map>
#include <mutex>
#include <thread>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace gpu {
namespace {

constexpr std::size_t kArena = 8ull << 30, kPage = 4096;

/// What a kernel may touch, to the byte; AddressSanitizer reports the rest.
#ifdef __SANITIZE_ADDRESS__
constexpr std::size_t kGuard = kPage;
void forbid(std::byte* first, std::size_t bytes) { ASAN_POISON_MEMORY_REGION(first, bytes); }
void allow(std::byte* first, std::size_t bytes) { ASAN_UNPOISON_MEMORY_REGION(first, bytes); }
#else
constexpr std::size_t kGuard = 0;
void forbid(std::byte*, std::size_t) {}
void allow(std::byte*, std::size_t) {}
#endif

/// Address space for a device's memory; open only while its work is done.
class Arena {
 public:
  Arena() : base_(static_cast<std::byte*>(mmap(nullptr, kArena, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0))) { free_[0] = kArena; }
  std::byte* take(std::size_t bytes) {
    const auto size = (bytes + kPage - 1) / kPage * kPage + kGuard;
    if (bytes > kArena || used_ + size - kGuard > limit) out_of_memory(bytes);
    for (auto at = free_.begin(); at != free_.end(); ++at) {
      if (at->second < size) continue;
      const auto [first, room] = *at;
      free_.erase(at);
      if (room > size) free_[first + size] = room - size;
      taken_[first] = size;
      used_ += size - kGuard;
      forbid(base_ + first, size);
      allow(base_ + first, bytes);
      return base_ + first;
    }
    out_of_memory(bytes);
  }
  void give_back(std::byte* memory) {
    const auto first = static_cast<std::size_t>(memory - base_);
    auto size = taken_.at(first);
    taken_.erase(first);
    used_ -= size - kGuard;
    allow(memory, size);  // work that still waits may write there, which a device would finish first
    madvise(memory, size, MADV_DONTNEED);
    auto at = free_.emplace(first, size).first;
    if (const auto next = std::next(at); next != free_.end() && at->first + at->second == next->first) {
      at->second += next->second;
      free_.erase(next);
    }
    if (at != free_.begin())
      if (const auto before = std::prev(at); before->first + before->second == at->first) {
        before->second += at->second;
        free_.erase(at);
      }
  }
  void enter() {
    if (users_++ == 0) open(true);
  }
  void leave() {
    if (--users_ == 0) open(false);
  }
  /// All leave for a while; how many they were.
  int leave_all() {
    if (users_ > 0) open(false);
    return std::exchange(users_, 0);
  }
  void enter_again(int users) {
    for (int i = 0; i < users; ++i) enter();
  }
  std::uint64_t free() const { return limit - std::min<std::uint64_t>(limit, used_); }
  std::size_t limit = kArena;

 private:
  void open(bool yes) const { mprotect(base_, kArena, yes ? PROT_READ | PROT_WRITE : PROT_NONE); }
  [[noreturn]] void out_of_memory(std::size_t bytes) const {
    shard::fail(shard::Code::Device, "device: out of memory: {} bytes are asked for, {} of {} are free", bytes, free(), limit);
  }

  std::byte* base_;
  std::map<std::size_t, std::size_t> free_, taken_;
  std::uint64_t used_ = 0;
  int users_ = 0;
};

using Work = std::function<void()>;

struct Queue {
  explicit Queue(int on) : device(on) {}
  int device;
  std::deque<Work> work;
  std::uint64_t given = 0, done = 0;
  std::shared_ptr<std::vector<Work>> recording;
  std::thread::id runner;                      ///< whose thread is in its work
};

struct Point {
  int device = 0;                              ///< on which its event was made
  Queue* queue = nullptr;
  std::uint64_t number = 0;                    ///< behind that many pieces of work
  std::chrono::steady_clock::time_point time = {};
};

struct Machine {
  std::recursive_mutex mutex;
  std::map<int, Arena> arenas;                 ///< by device, made when first used
  int depth = 0;                               ///< pieces of work that wait for each other
  Emulated told;
  std::uint64_t done = 0;                      ///< pieces of work
};
Machine& machine() {
  static auto* const one = new Machine;  // outlives every buffer
  return *one;
}

thread_local int current_device = 0;

Arena& arena_of(int device) {
  auto& arena = machine().arenas[device];
  arena.limit = std::min(machine().told.memory, kArena);
  return arena;
}

Queue& queue(StreamView stream) { return *static_cast<Queue*>(stream.handle); }

void run_until(Queue& queue, std::uint64_t number) {
  auto& all = machine();
  const std::lock_guard lock(all.mutex);
  const auto me = std::this_thread::get_id();
  shard::require(queue.runner == std::thread::id() || queue.runner == me, shard::Code::Device, [] { return "emulated device: two threads wait for one stream"; });
  while (queue.done < number && !queue.work.empty()) {
    const auto before = std::exchange(queue.runner, me);
    const auto work = std::move(queue.work.front());
    queue.work.pop_front();
    if (all.told.pause.count() > 0) std::this_thread::sleep_for(all.told.pause);
    shard::require(all.done++ < all.told.lost_after, shard::Code::Device, [] { return "device: lost (emulated)"; });
    ++all.depth;
    arena_of(queue.device).enter();
    struct Close {
      Machine& all;
      Queue& queue;
      std::thread::id before;
      ~Close() {
        ++queue.done;
        queue.runner = before;
        --all.depth;
        arena_of(queue.device).leave();
      }
    } close{all, queue, before};
    work();
  }
}

}  // namespace

void emulate(const Emulated& device) {
  auto& all = machine();
  const std::lock_guard lock(all.mutex);
  all.told = device;
}

void let_others_work(const Work& wait) {
  auto& all = machine();
  const int depth = std::exchange(all.depth, 0);  // each level holds the lock once
  std::map<Arena*, int> users;
  for (auto& [device, arena] : all.arenas) users[&arena] = arena.leave_all();
  for (int i = 0; i < depth; ++i) all.mutex.unlock();
  wait();
  for (int i = 0; i < depth; ++i) all.mutex.lock();
  for (const auto& [arena, count] : users) arena->enter_again(count);
  all.depth = depth;
}

Emulated emulated() {
  const std::lock_guard lock(machine().mutex);
  return machine().told;
}

void enqueue(StreamView on, Work work) {
  auto& to = queue(on);
  const std::lock_guard lock(machine().mutex);
  if (to.recording) return to.recording->push_back(std::move(work));
  to.work.push_back(std::move(work));
  ++to.given;
}

DeviceInfo device_info(int index) {
  const auto count = emulated().devices;
  shard::require(index >= 0 && index < count, shard::Code::Device, [&] { return fmt::format("device {}: there are {} emulated devices", index, count); });
  const std::lock_guard lock(machine().mutex);
  const auto& arena = arena_of(index);
  return {index, "emulated on the host", 9, 0, 4, arena.limit, arena.free(), fmt::format("EMULATED-{}-{}", ::getpid(), index)};
}
Probe probe() {
  Probe out;
  for (int i = 0; i < emulated().devices; ++i) out.devices.push_back(device_info(i));
  if (out.devices.empty()) out.why = "no device is emulated";
  return out;
}
bool is_emulated() { return true; }
bool has_warpgroups() { return true; }
void use_device(int index) { current_device = device_info(index).index; }

void require_here(StreamView on) {
  const auto device = queue(on).device;
  shard::require(device == current_device, shard::Code::Device, [&] { return fmt::format("emulated device: work for a stream of device {} is given while device {} is the thread's", device, current_device); });
}

Stream::Stream() : handle_(new Queue(current_device)) {}
Stream::~Stream() {
  auto* mine = static_cast<Queue*>(handle_);
  try {
    run_until(*mine, mine->given);
  } catch (...) {  // as CUDA does, a stream that ends tells nobody
  }
  delete mine;
}
void Stream::wait() const { gpu::wait(*this); }
void wait(StreamView stream) { run_until(queue(stream), queue(stream).given); }
bool done(StreamView stream) {
  wait(stream);
  return true;
}

Event::Event() : handle_(new std::shared_ptr<Point>(std::make_shared<Point>(Point{.device = current_device}))) {}
Event::~Event() { delete static_cast<std::shared_ptr<Point>*>(handle_); }
void Event::record(StreamView on) {
  auto& mine = *static_cast<std::shared_ptr<Point>*>(handle_);
  shard::require(mine->device == queue(on).device, shard::Code::Device, [&] { return fmt::format("emulated device: an event of device {} is recorded on a stream of device {}", mine->device, queue(on).device); });
  auto point = std::make_shared<Point>(Point{.device = mine->device, .queue = &queue(on)});
  enqueue(on, [point] { point->time = std::chrono::steady_clock::now(); });
  point->number = point->queue->given;
  mine = point;
}
void Event::hold(StreamView stream) const {
  const auto point = *static_cast<std::shared_ptr<Point>*>(handle_);
  if (!point->queue || point->queue == &queue(stream) || point->queue->recording) return;
  enqueue(stream, [point] { run_until(*point->queue, point->number); });
}
void Event::wait() const {
  const auto& point = **static_cast<std::shared_ptr<Point>*>(handle_);
  if (point.queue) run_until(*point.queue, point.number);
}
float Event::since(const Event& start) const {
  const auto& from = **static_cast<std::shared_ptr<Point>*>(start.handle_);
  const auto& to = **static_cast<std::shared_ptr<Point>*>(handle_);
  return std::chrono::duration<float, std::milli>(to.time - from.time).count();
}

DeviceBuffer::DeviceBuffer(std::size_t bytes) : size_(bytes) {
  if (bytes == 0) return;
  auto& all = machine();
  const std::lock_guard lock(all.mutex);
  auto& arena = arena_of(current_device);
  memory_ = {arena.take(bytes), [&arena](std::byte* mine) {
               const std::lock_guard lock(machine().mutex);
               arena.give_back(mine);
             }};
}

PinnedBuffer::PinnedBuffer(std::size_t bytes) : memory_(new std::byte[bytes], [](std::byte* memory) { delete[] memory; }), size_(bytes) {}

void to_device(std::byte* to, const void* from, std::size_t bytes, StreamView on) {
  enqueue(on, [=] { std::memcpy(to, from, bytes); });
}
void to_host(void* to, const std::byte* from, std::size_t bytes, StreamView on) {
  enqueue(on, [=] { std::memcpy(to, from, bytes); });
}
void on_device(std::byte* to, const std::byte* from, std::size_t bytes, StreamView on) {
  enqueue(on, [=] { std::memcpy(to, from, bytes); });
}
void set_bytes(std::byte* to, int value, std::size_t bytes, StreamView on) {
  require_here(on);
  enqueue(on, [=] { std::memset(to, value, bytes); });
}

void Graph::begin(StreamView on) { queue(on).recording = std::make_shared<std::vector<Work>>(); }
Graph Graph::end(StreamView on) {
  Graph out;
  out.handle_ = std::exchange(queue(on).recording, nullptr);
  return out;
}
void Graph::launch(StreamView on) const {
  const auto all = std::static_pointer_cast<std::vector<Work>>(handle_);
  enqueue(on, [all] {
    for (const auto& work : *all) work();
  });
}

}  // namespace gpu
