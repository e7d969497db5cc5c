// The HDF5 C library: owners of its handles, one lock (it is not thread safe), its failures as errors.
#pragma once

#include "libshard/error.h"

#define H5_USE_110_API  // one set of functions in every version since
#include <hdf5.h>

#include <mutex>
#include <string>
#include <utility>

namespace formats::hdf5 {

/// Held around every call into the library; again by what ends while an error unwinds. Silences the library's own messages, which it prints or not by thread.
class Library {
 public:
  Library();

 private:
  std::lock_guard<std::recursive_mutex> lock_;
};

/// Something could not be closed: the library is left as it is when the process ends.
void leave_open();

/// Owns one handle of any kind.
class Handle {
 public:
  Handle() = default;
  explicit Handle(hid_t id) : id_(id) {}
  Handle(Handle&& other) noexcept : id_(std::exchange(other.id_, H5I_INVALID_HID)) {}
  Handle& operator=(Handle&& other) noexcept {
    std::swap(id_, other.id_);
    return *this;
  }
  ~Handle() {
    if (id_ >= 0) close();
  }
  operator hid_t() const { return id_; }
  /// False where the library could not, which it then must not be asked to do at exit.
  bool close() {
    const auto id = std::exchange(id_, H5I_INVALID_HID);
    if (H5Iis_valid(id) <= 0 || H5Idec_ref(id) >= 0) return true;  // a data set is closed with its file
    leave_open();
    return false;
  }

 private:
  hid_t id_ = H5I_INVALID_HID;
};

/// The handle, or an error that says what could not be done.
inline Handle checked(hid_t id, shard::Code code, const std::string& what) {
  shard::require(id >= 0, code, [&] { return what; });
  return Handle(id);
}

/// Registers zstd's filter number so that files with it can be made.
void prepare();

constexpr H5Z_filter_t kZstd = 32015;                  ///< registered with The HDF Group
constexpr const char* kReserved = "shardkit";          ///< the group of what is no tensor

}  // namespace formats::hdf5
