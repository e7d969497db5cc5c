// Chunks are packed and unpacked outside the library (chunk_filters.cpp), so its own filter is only a name.
#include "formats/hdf5/library.h"

namespace formats::hdf5 {
namespace {

std::size_t never(unsigned, std::size_t, const unsigned*, std::size_t, std::size_t*, void**) { return 0; }

std::recursive_mutex& mutex() {
  static std::recursive_mutex one;
  return one;
}

}  // namespace

Library::Library() : lock_(mutex()) {
  // At exit the library would close once more what it could not close before, and crash (a full disk). Ours is closed by then.
  [[maybe_unused]] static const bool first = H5dont_atexit() >= 0;
  [[maybe_unused]] static thread_local const bool silent = H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr) >= 0;
}

void prepare() {
  const Library lock;
  static const bool done = [] {
    H5PLset_loading_state(0);  // no code from plug-in folders
    const H5Z_class2_t zstd{H5Z_CLASS_T_VERS, kZstd, 1, 1, "zstd", nullptr, nullptr, never};
    return H5Zregister(&zstd) >= 0;
  }();
  (void)done;
}

}  // namespace formats::hdf5
