// Chunks are packed and unpacked outside the library (chunk_filters.cpp), so its own filter is only a name.
#include "formats/hdf5/library.h"

namespace formats::hdf5 {
namespace {

std::size_t never(unsigned, std::size_t, const unsigned*, std::size_t, std::size_t*, void**) { return 0; }

}  // namespace

std::recursive_mutex& library() {
  static std::recursive_mutex mutex;
  return mutex;
}

void prepare() {
  static const bool done = [] {
    H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr);
    H5PLset_loading_state(0);  // no code from plug-in folders
    const H5Z_class2_t zstd{H5Z_CLASS_T_VERS, kZstd, 1, 1, "zstd", nullptr, nullptr, never};
    return H5Zregister(&zstd) >= 0;
  }();
  (void)done;
}

}  // namespace formats::hdf5
