// cuFile, loaded where a device is used. Its few entry points are declared here, so that the build needs no header of it; where the
// header is there, the build compares.
#include "gpu/storage.h"

#include "gpu/libs/library.h"
#include "libshard/error.h"

#include <map>
#include <mutex>
#include <set>
#include <tuple>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#if __has_include(<cufile.h>)
#include <cufile.h>
#define SHARDKIT_CUFILE_HEADER
#endif

namespace gpu {
namespace {

struct Status {
  int error, driver;
};
struct Descriptor {
  int type = 1;  ///< a file descriptor
  union {
    int fd;
    void* handle;
  } file;
  const void* operations = nullptr;
};
struct Properties {
  struct {
    unsigned major, minor;
    std::size_t poll_threshold, most_direct;
    unsigned status, control;
  } nvfs;
  unsigned features, device_cache, buffer_cache, pinned_memory, batch, batch_timeout;
};
constexpr const char* kDriver = "/proc/driver/nvidia-fs/devcount";

#ifdef SHARDKIT_CUFILE_HEADER
static_assert(sizeof(Status) == sizeof(CUfileError_t) && sizeof(Descriptor) == sizeof(CUfileDescr_t) && offsetof(Descriptor, operations) == offsetof(CUfileDescr_t, fs_ops));
static_assert(offsetof(Properties, features) == offsetof(CUfileDrvProps_t, fflags) && offsetof(Properties, nvfs.status) == offsetof(CUfileDrvProps_t, nvfs.dstatusflags));
static_assert(sizeof(Properties) >= sizeof(CUfileDrvProps_t) && CU_FILE_HANDLE_TYPE_OPAQUE_FD == 1);
#endif

struct CuFile {
  Status (*open)();
  Status (*properties)(Properties* out);
  Status (*add)(void** handle, Descriptor* file);
  void (*remove)(void* handle);
  Status (*remember)(const void* memory, std::size_t bytes, int flags);
  Status (*forget)(const void* memory);
  ssize_t (*read)(void* handle, void* memory, std::size_t bytes, off_t offset, off_t at);
  ssize_t (*write)(void* handle, const void* memory, std::size_t bytes, off_t offset, off_t at);
};

/// A file that cuFile knows, open past the page cache.
class Registered {
 public:
  Registered(const CuFile& library, int descriptor, bool writable) : library_(library) {
    const auto path = fmt::format("/proc/self/fd/{}", descriptor);
    descriptor_ = ::open(path.c_str(), (writable ? O_RDWR : O_RDONLY) | O_DIRECT | O_CLOEXEC);
    if (descriptor_ < 0) return;
    Descriptor file;
    file.file.fd = descriptor_;
    if (library_.add(&handle_, &file).error != 0) handle_ = nullptr;
  }
  ~Registered() {
    if (handle_) library_.remove(handle_);
    if (descriptor_ >= 0) ::close(descriptor_);
  }
  Registered(const Registered&) = delete;
  Registered& operator=(const Registered&) = delete;
  void* handle() const { return handle_; }  ///< null: not a file that it takes

 private:
  const CuFile& library_;
  int descriptor_ = -1;
  void* handle_ = nullptr;
};

class Direct final : public DirectStorage {
 public:
  explicit Direct(const CuFile& library) : library_(library) {}

  bool read(int descriptor, std::uint64_t offset, std::byte* memory, std::uint64_t at, std::uint64_t bytes) override {
    return whole(descriptor, false, bytes, [&](void* handle, std::uint64_t done) {
      return library_.read(handle, memory, bytes - done, static_cast<off_t>(offset + done), static_cast<off_t>(at + done));
    });
  }
  bool write(int descriptor, std::uint64_t offset, const std::byte* memory, std::uint64_t at, std::uint64_t bytes) override {
    return whole(descriptor, true, bytes, [&](void* handle, std::uint64_t done) {
      return library_.write(handle, memory, bytes - done, static_cast<off_t>(offset + done), static_cast<off_t>(at + done));
    });
  }
  void remember(std::byte* memory, std::uint64_t bytes) override {
    if (library_.remember(memory, bytes, 0).error != 0) return;  // works all the same
    const std::lock_guard lock(mutex_);
    remembered_.insert(memory);
  }
  void forget(std::byte* memory) override {
    const std::lock_guard lock(mutex_);
    if (remembered_.erase(memory) > 0) library_.forget(memory);
  }

 private:
  /// What stops early goes another way from its start.
  template <typename Once>
  bool whole(int descriptor, bool writable, std::uint64_t bytes, const Once& once) {
    const auto file = registered(descriptor, writable);
    if (!file || !file->handle()) return false;
    for (std::uint64_t done = 0; done < bytes;) {
      const auto n = once(file->handle(), done);
      if (n <= 0) return false;
      done += static_cast<std::uint64_t>(n);
    }
    return true;
  }

  std::shared_ptr<Registered> registered(int descriptor, bool writable) {
    struct stat about {};
    if (::fstat(descriptor, &about) != 0) return nullptr;
    const std::lock_guard lock(mutex_);
    if (files_.size() >= kMostOpen) files_.clear();  // those in use are kept by their users
    auto& file = files_[{about.st_dev, about.st_ino, writable}];
    if (!file) file = std::make_shared<Registered>(library_, descriptor, writable);
    return file;
  }

  static constexpr std::size_t kMostOpen = 256;
  const CuFile& library_;
  std::mutex mutex_;
  std::map<std::tuple<dev_t, ino_t, bool>, std::shared_ptr<Registered>> files_;
  std::set<std::byte*> remembered_;
};

/// Loaded and opened once, never closed: it ends with the process, as the driver does.
struct Loaded {
  CuFile library{};
  std::string why;
  bool works = false;
};

Loaded load() {
  Loaded out;
  if (::access(kDriver, R_OK) != 0) {  // cuFile would copy through the host as well, once it got over looking for it, and leave a log where we are
    out.why = "there is no nvidia-fs driver";
    return out;
  }
  try {
    const Library file("cuFile", "", {"libcufile.so.0", "libcufile.so"});
    file.resolve(out.library.open, "cuFileDriverOpen");
    file.resolve(out.library.properties, "cuFileDriverGetProperties");
    file.resolve(out.library.add, "cuFileHandleRegister");
    file.resolve(out.library.remove, "cuFileHandleDeregister");
    file.resolve(out.library.remember, "cuFileBufRegister");
    file.resolve(out.library.forget, "cuFileBufDeregister");
    file.resolve(out.library.read, "cuFileRead");
    file.resolve(out.library.write, "cuFileWrite");
    out.why = file.title();
  } catch (const shard::Error& error) {
    out.why = error.what();
    return out;
  }
  if (const auto status = out.library.open(); status.error != 0) {
    out.why += fmt::format(" does not start (error {}, of the driver {})", status.error, status.driver);
    return out;
  }
  Properties properties{};
  if (const auto status = out.library.properties(&properties); status.error != 0) {
    out.why += fmt::format(" does not tell what it can (error {})", status.error);
    return out;
  }
  out.works = properties.nvfs.status != 0;
  if (!out.works) out.why += " finds no file system that reaches devices; it would copy through the host as well";
  return out;
}

}  // namespace

DirectChoice direct_storage() {
  static const auto loaded = load();
  if (!loaded.works) return {nullptr, loaded.why};
  return {std::make_unique<Direct>(loaded.library), "GPUDirect Storage by " + loaded.why};
}

}  // namespace gpu
