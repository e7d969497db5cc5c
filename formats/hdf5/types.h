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
/// The type of a data set's elements, or why there is none.
struct Elements {
  std::optional<Type> type;
  std::string refused;  ///< numbers, but none of ours: what they are. Empty beside no type: no numbers (texts, compounds, references)
};
/// Throws BadFormat where the attribute `torch_dtype` cannot be read.
Elements type_of(hid_t dataset, const std::string& where);
/// The library's own type; a new handle.
Handle stored_type(shard::DType dtype);
/// torch's name where the stored type does not say it all; else "".
std::string torch_attribute(shard::DType dtype);

/// A text attribute; nullopt where there is none, or it is no single text. Throws BadFormat where it cannot be read.
std::optional<std::string> text_attribute(hid_t object, const char* name, const std::string& where);
void set_attribute(hid_t object, const char* name, const std::string& text);

}  // namespace formats::hdf5
