// How a kernel is written: a struct of plain values whose call operator is one block's work in phases. Within a phase every thread
// runs on its own; between phases all threads of the block have seen each other's writes.
//
//   struct RowSum {
//     static constexpr unsigned kThreads = 128;
//     struct Shared { float part[kThreads]; };   // the block's shared memory
//     struct Own { float sum; };                 // what a thread keeps from phase to phase
//     const float* x; float* out; std::int64_t columns;
//     template <typename Block> GPU_CODE void operator()(Block& block) const {
//       block.each([&](unsigned thread, Own& own) { own.sum = 0; for (auto c = thread; c < columns; c += kThreads) own.sum += x[block.x() * columns + c]; });
//       block.sum(&Own::sum);                    // every thread's `sum` is now the block's
//       block.each([&](unsigned thread, Own& own) { if (thread == 0) out[block.x()] = own.sum; });
//     }
//   };
//   launch(stream, {rows}, RowSum{x, out, columns});
//
// platform.h is gpu/cuda's where nvcc compiles this and gpu/emulated's where the host's compiler does; both define
//   GPU_CODE      what a function that kernels call is declared with
//   GPU_UNROLL    before a loop over an array that should lie in registers
//   Block<Kernel> x() y() z() (which block), shared(), and
//     each(body)          one phase: body(thread, own) for every thread, then a barrier
//     each_apart(body)    the same without the barrier: what it writes is read by the same thread only, until the next barrier
//     sum(&Own::f), max(&Own::f)            over the block; every thread gets the result; a barrier
//     warp_sum(&Own::f), warp_max(&Own::f)  over each 32 neighbours; no barrier
//   launch(stream, grid, kernel)
//   load_once(from)     Words: 16 bytes, aligned so, that nobody reads again and nobody writes; they displace nothing in near caches
//   atomic_add(double*/float*/unsigned*/unsigned long long*, value), atomic_max(unsigned*/unsigned long long*, value)
#pragma once

#include "libshard/error.h"

#include <cstdint>
#include <type_traits>

namespace gpu {

/// Blocks of a launch.
struct Grid {
  std::uint64_t x = 1, y = 1, z = 1;
};

struct alignas(16) Words {
  std::uint32_t item[4];
};

constexpr std::size_t kMaxShared = 227 << 10;      ///< what compute capability 9.0 gives a block; 8.0 gives 163 KiB
constexpr std::size_t kPortableShared = 99 << 10;  ///< what every one from 8.0 on gives: 8.6, 8.9 and 12.0 no more

/// Refuses a launch that no device takes, and one with nothing to do (false).
inline bool check_grid(const Grid& grid) {
  shard::require(grid.x <= 0x7fffffff && grid.y <= 65535 && grid.z <= 65535, shard::Code::Device,
                 [&] { return fmt::format("launch: {} × {} × {} blocks are more than a device takes", grid.x, grid.y, grid.z); });
  return grid.x > 0 && grid.y > 0 && grid.z > 0;
}

/// A kernel for some devices only says what those give.
template <typename Kernel>
constexpr std::size_t most_shared() {
  if constexpr (requires { Kernel::kMostShared; }) return Kernel::kMostShared;
  else return kPortableShared;
}

template <typename Kernel>
constexpr void check_kernel() {
  static_assert(Kernel::kThreads >= 32 && Kernel::kThreads <= 1024 && Kernel::kThreads % 32 == 0, "whole warps, at most 1024 threads");
  static_assert(sizeof(typename Kernel::Shared) <= most_shared<Kernel>(), "shared memory of a block");
  static_assert(alignof(typename Kernel::Shared) <= 1024, "how a block's shared memory is aligned");
  static_assert(std::is_trivially_copyable_v<Kernel> && sizeof(Kernel) <= 4096, "kernels travel as parameters");
}

/// For loops over `count` items, `each` of them in a block's hands.
constexpr std::uint64_t blocks_for(std::uint64_t count, std::uint64_t each) { return (count + each - 1) / each; }

}  // namespace gpu

#include <platform.h>  // of gpu/cuda or gpu/emulated, as the build says
