// Blocks of kernels on the host, one thread after another within a phase, forwards and backwards in turn: what a missing barrier
// would leave to chance on a device comes out wrong here.
#pragma once

#include "gpu/runtime.h"

#include <atomic>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define GPU_CODE inline
#define GPU_UNROLL

namespace gpu {

/// Runs `work` when the stream is waited for, in order; device memory can be touched by it alone.
void enqueue(StreamView on, std::function<void()> work);
/// As CUDA does of a kernel: its stream is of the calling thread's device.
void require_here(StreamView on);
/// From inside `work` alone: other threads' streams go on while `wait` waits for them; it must not touch device memory nor throw.
void let_others_work(const std::function<void()>& wait);

template <typename Kernel>
class Block {
 public:
  using Shared = typename Kernel::Shared;
  using Own = typename Kernel::Own;
  static constexpr unsigned kThreads = Kernel::kThreads;

  Block(unsigned x, unsigned y, unsigned z, Shared& shared, std::vector<Own>& own) : x_(x), y_(y), z_(z), shared_(shared), own_(own) {}
  unsigned x() const { return x_; }
  unsigned y() const { return y_; }
  unsigned z() const { return z_; }
  Shared& shared() { return shared_; }

  template <typename Body>
  void each(Body&& body) {
    for (unsigned i = 0; i < kThreads; ++i) {
      const auto thread = backwards_ ? kThreads - 1 - i : i;
      body(thread, own_[thread]);
    }
    backwards_ = !backwards_;
  }
  template <typename Body>
  void each_apart(Body&& body) {
    each(body);
  }
  template <typename T>
  void warp_sum(T Own::* field) {
    join(32, field, [](T a, T b) { return a + b; });
  }
  template <typename T>
  void warp_max(T Own::* field) {
    join(32, field, [](T a, T b) { return b > a ? b : a; });
  }
  template <typename T>
  void sum(T Own::* field) {
    warp_sum(field);
    join(kThreads, field, [](T a, T b) { return a + b; }, 32);
  }
  template <typename T>
  void max(T Own::* field) {
    join(kThreads, field, [](T a, T b) { return b > a ? b : a; });
  }
  Own& own(unsigned thread) { return own_[thread]; }  ///< for warp-wide instructions of gpu/emulated

 private:
  /// Over runs of `width` threads, every `step`th of them.
  template <typename T, typename Op>
  void join(unsigned width, T Own::* field, Op op, unsigned step = 1) {
    for (unsigned first = 0; first < kThreads; first += width) {
      T all = own_[first].*field;
      for (unsigned i = step; i < width; i += step) all = op(all, own_[first + i].*field);
      for (unsigned i = 0; i < width; ++i) own_[first + i].*field = all;
    }
  }

  unsigned x_, y_, z_;
  Shared& shared_;
  std::vector<Own>& own_;
  bool backwards_ = false;
};

inline std::atomic<unsigned> blocks_run = 0;

template <typename Kernel>
void launch(StreamView on, const Grid& grid, const Kernel& kernel) {
  check_kernel<Kernel>();
  if (!check_grid(grid)) return;
  require_here(on);
  enqueue(on, [grid, kernel] {
    struct alignas(128) alignas(typename Kernel::Shared) Memory {
      unsigned char bytes[sizeof(typename Kernel::Shared)];
    };
    const auto memory = std::make_unique<Memory>();
    std::vector<typename Kernel::Own> own(Kernel::kThreads);
    for (std::uint64_t z = 0; z < grid.z; ++z)
      for (std::uint64_t y = 0; y < grid.y; ++y)
        for (std::uint64_t x = 0; x < grid.x; ++x) {
          // What nobody wrote is NaN or, in every other block, larger than any number.
          std::memset(memory->bytes, blocks_run++ % 2 ? 0x7f : 0xff, sizeof memory->bytes);
          Block<Kernel> block(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z),
                              *reinterpret_cast<typename Kernel::Shared*>(memory->bytes), own);
          kernel(block);
        }
  });
}

inline Words load_once(const void* from) { return *static_cast<const Words*>(from); }
template <typename T>
void atomic_add(T* to, T value) {
  *to += value;
}
template <typename T>
void atomic_max(T* to, T value) {
  if (value > *to) *to = value;
}

}  // namespace gpu
