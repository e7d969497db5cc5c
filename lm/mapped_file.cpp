// Mappings stand in a fixed table, since a signal handler has to find them.
#include "lm/mapped_file.h"

#include <sys/mman.h>
#include <sys/stat.h>

#include <cstdint>

namespace lm {

struct MappedFile::Slot {
  std::atomic<bool> taken = false, torn = false;
  std::atomic<std::byte*> base = nullptr;
  std::atomic<std::size_t> size = 0;
};

namespace {

constexpr std::size_t kSlots = 4096, kPage = 4096, kSample = 1 << 20;

/// The whole pages that a part touches.
struct Pages {
  void* first;
  std::size_t size;
};
Pages pages_of(std::span<const std::byte> part) {
  const auto lo = reinterpret_cast<std::uintptr_t>(part.data()) / kPage * kPage;
  const auto hi = (reinterpret_cast<std::uintptr_t>(part.data()) + part.size() + kPage - 1) / kPage * kPage;
  return {reinterpret_cast<void*>(lo), hi - lo};
}

}  // namespace

MappedFile::Slot* MappedFile::slots() {
  static Slot all[kSlots];
  return all;
}

std::shared_ptr<const MappedFile> MappedFile::map(const shard::FileRange& file) {
  struct stat status;
  if (fstat(file.descriptor, &status) != 0 || !S_ISREG(status.st_mode) || status.st_size <= 0) return nullptr;
  Slot* slot = nullptr;
  for (std::size_t i = 0; i < kSlots && !slot; ++i)
    if (!slots()[i].taken.exchange(true)) slot = &slots()[i];
  if (!slot) return nullptr;
  const auto size = static_cast<std::size_t>(status.st_size);
  auto* base = mmap(nullptr, size, PROT_READ, MAP_SHARED, file.descriptor, 0);
  if (base == MAP_FAILED) {
    slot->taken = false;
    return nullptr;
  }
  slot->torn = false;
  slot->size = size;
  slot->base = static_cast<std::byte*>(base);
  return std::shared_ptr<const MappedFile>(new MappedFile(*slot, file.owner));
}

MappedFile::~MappedFile() {
  auto* base = slot_.base.exchange(nullptr);
  munmap(base, slot_.size);
  slot_.taken = false;
}

std::span<const std::byte> MappedFile::bytes() const { return {slot_.base.load(), slot_.size.load()}; }
bool MappedFile::torn() const { return slot_.torn; }

void MappedFile::bring(std::span<const std::byte> part) {
  const auto [first, size] = pages_of(part);
  // One page of many is asked about. Of a file that belongs to others, all are said to be there.
  bool present = true;
  for (std::size_t at = 0; present && at < size; at += kSample) {
    unsigned char page = 0;
    present = mincore(static_cast<std::byte*>(first) + at, kPage, &page) == 0 && page & 1;
  }
  if (present) return;
#ifdef MADV_HUGEPAGE
  madvise(first, size, MADV_HUGEPAGE);  // read and kept in large pages, however far the device reads ahead
#endif
#ifdef MADV_POPULATE_READ
  if (madvise(first, size, MADV_POPULATE_READ) == 0) return forget(part);
#endif
  madvise(first, size, MADV_WILLNEED);
}
void MappedFile::forget(std::span<const std::byte> part) {
  const auto [first, size] = pages_of(part);
  madvise(first, size, MADV_DONTNEED);
}

bool mend_mapping(void* address) noexcept {
  auto* const at = static_cast<std::byte*>(address);
  auto* const slots = MappedFile::slots();
  for (std::size_t i = 0; i < kSlots; ++i) {
    auto* const base = slots[i].base.load();
    const auto size = (slots[i].size.load() + kPage - 1) / kPage * kPage;
    if (!base || at < base || at >= base + size) continue;
    slots[i].torn = true;
    // To the end of the mapping: a file that ends earlier has nothing behind.
    auto* const page = reinterpret_cast<std::byte*>(reinterpret_cast<std::uintptr_t>(at) / kPage * kPage);
    return mmap(page, static_cast<std::size_t>(base + size - page), PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED;
  }
  return false;
}

}  // namespace lm
