// Direct storage of the emulated device: where tests ask for it, files are read into device memory as cuFile would.
#include "gpu/storage.h"

#include "gpu/emulated/device.h"
#include "gpu/kernel.h"

#include <unistd.h>

namespace gpu {
namespace {

/// A plain pread() or pwrite() of everything, with device memory open.
template <typename Once>
bool whole(std::uint64_t bytes, const Once& once) {
  bool good = true;
  const Stream stream;
  enqueue(stream, [&] {
    for (std::uint64_t done = 0; done < bytes && good;) {
      const auto n = once(done);
      good = n > 0;
      done += good ? static_cast<std::uint64_t>(n) : 0;
    }
  });
  stream.wait();
  return good;
}

struct Emulation final : DirectStorage {
  bool read(int descriptor, std::uint64_t offset, std::byte* memory, std::uint64_t at, std::uint64_t bytes) override {
    return whole(bytes, [&](std::uint64_t done) { return pread(descriptor, memory + at + done, bytes - done, static_cast<off_t>(offset + done)); });
  }
  bool write(int descriptor, std::uint64_t offset, const std::byte* memory, std::uint64_t at, std::uint64_t bytes) override {
    return whole(bytes, [&](std::uint64_t done) { return pwrite(descriptor, memory + at + done, bytes - done, static_cast<off_t>(offset + done)); });
  }
};

}  // namespace

DirectChoice direct_storage() {
  if (!emulated().direct) return {nullptr, "the device is emulated"};
  return {std::make_unique<Emulation>(), "direct storage, emulated"};
}

}  // namespace gpu
