// Chunks are packed and unpacked outside the library (chunk_filters.cpp), so its own filter is only a name.
#include "formats/hdf5/library.h"

namespace formats::hdf5 {
namespace {

std::size_t never(unsigned, std::size_t, const unsigned*, std::size_t, std::size_t*, void**) { return 0; }

/// "Converts" the stored pointer to a text of any length into 16 bytes: as they are (types.cpp follows it).
herr_t as_stored(hid_t, hid_t to, H5T_cdata_t* data, std::size_t, std::size_t, std::size_t, void*, void*, hid_t) {
  if (data->command == H5T_CONV_INIT) data->need_bkg = H5T_BKG_NO;
  return data->command != H5T_CONV_INIT || H5Tget_size(to) == 16 ? 0 : -1;
}

bool register_as_stored() {
  const Handle text(H5Tcopy(H5T_C_S1)), bytes(H5Tcreate(H5T_OPAQUE, 16));
  return H5Tset_size(text, H5T_VARIABLE) >= 0 && H5Tregister(H5T_PERS_SOFT, "as stored", text, bytes, as_stored) >= 0;
}

std::recursive_mutex& mutex() {
  static std::recursive_mutex one;
  return one;
}

/// What H5atexit would do, but for a library that could not close a file (a full disk): it would try once more, and crash.
struct Ending {
  bool sound = true;
  Ending() { H5dont_atexit(); }
  ~Ending() {
    if (sound) H5close();
  }
};

Ending& ending() {
  static Ending one;
  return one;
}

}  // namespace

void leave_open() { ending().sound = false; }

Library::Library() : lock_(mutex()) {
  ending();
  [[maybe_unused]] static thread_local const bool silent = H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr) >= 0;
}

void prepare() {
  const Library lock;
  static const bool done = [] {
    H5PLset_loading_state(0);  // no code from plug-in folders
    const H5Z_class2_t zstd{H5Z_CLASS_T_VERS, kZstd, 1, 1, "zstd", nullptr, nullptr, never};
    return H5Zregister(&zstd) >= 0 && register_as_stored();
  }();
  (void)done;
}

}  // namespace formats::hdf5
