// One list of free blocks by size for the whole process, with a cap on what it keeps.
#include "lm/buffer.h"

#include <map>
#include <mutex>
#include <new>

namespace lm {
namespace {

constexpr std::size_t kKept = 192u << 20, kAlignment = 64;

struct Pool {
  std::mutex mutex;
  std::multimap<std::size_t, std::byte*> free;
  std::size_t bytes = 0;
};

Pool& pool() {
  static auto* const one = new Pool;  // outlives every buffer
  return *one;
}

void give_back(std::byte* memory, std::size_t size) {
  auto& all = pool();
  {
    const std::lock_guard lock(all.mutex);
    if (all.bytes + size <= kKept) {
      all.bytes += size;
      all.free.emplace(size, memory);
      return;
    }
  }
  ::operator delete(memory, std::align_val_t(kAlignment));
}

}  // namespace

std::shared_ptr<std::byte> take_buffer(std::size_t bytes) {
  constexpr std::size_t kStep = 256 << 10;
  auto size = bytes < kStep ? (bytes + kAlignment) / kAlignment * kAlignment : (bytes + kStep - 1) / kStep * kStep;
  std::byte* found = nullptr;
  if (size >= 4096) {
    auto& all = pool();
    const std::lock_guard lock(all.mutex);
    if (const auto at = all.free.lower_bound(size); at != all.free.end() && at->first <= 2 * size) {
      size = at->first;
      found = at->second;
      all.bytes -= size;
      all.free.erase(at);
    }
  }
  if (!found) found = static_cast<std::byte*>(::operator new(size, std::align_val_t(kAlignment)));
  if (size < 4096) return {found, [](std::byte* memory) { ::operator delete(memory, std::align_val_t(kAlignment)); }};
  return {found, [size](std::byte* memory) { give_back(memory, size); }};
}

}  // namespace lm
