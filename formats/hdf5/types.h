// Element types of HDF5 data sets and ours; what HDF5 has no type for is stored as an unsigned integer of its size with the
// attribute `torch_dtype`.
#pragma once

#include "formats/hdf5/library.h"
#include "libshard/dtype.h"

#include <optional>
#include <string>

namespace formats::hdf5 {

struct Type {
  shard::DType dtype;
  bool big_endian = false;
};
/// nullopt where an element is no number (strings, compounds, references).
std::optional<Type> type_of(hid_t dataset);
/// The library's own type; a new handle.
Handle stored_type(shard::DType dtype);
/// torch's name where the stored type does not say it all; else "".
std::string torch_attribute(shard::DType dtype);

/// A text attribute; "" where there is none.
std::string text_attribute(hid_t object, const char* name);
void set_attribute(hid_t object, const char* name, const std::string& text);

}  // namespace formats::hdf5
