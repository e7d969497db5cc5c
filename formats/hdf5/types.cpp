// One question in each direction; h5py's conventions for half and bool.
#include "formats/hdf5/types.h"

namespace formats::hdf5 {
namespace {

using shard::DType;

constexpr std::size_t kLongestText = 1 << 20;

Handle half() {
  auto type = checked(H5Tcopy(H5T_IEEE_F32LE), shard::Code::Io, "HDF5: no type");
  H5Tset_fields(type, 15, 10, 5, 0, 10);
  H5Tset_size(type, 2);
  H5Tset_ebias(type, 15);
  return type;
}

Handle boolean() {
  auto type = checked(H5Tenum_create(H5T_STD_I8LE), shard::Code::Io, "HDF5: no type");
  const signed char no = 0, yes = 1;
  H5Tenum_insert(type, "FALSE", &no);
  H5Tenum_insert(type, "TRUE", &yes);
  return type;
}

}  // namespace

std::optional<Type> type_of(hid_t dataset) {
  const Handle type(H5Dget_type(dataset));
  const auto size = H5Tget_size(type);
  const auto order = H5Tget_order(type);
  Type out{DType::U8, order == H5T_ORDER_BE && size > 1};
  if (const auto torch = text_attribute(dataset, "torch_dtype"); !torch.empty()) {
    const auto named = shard::dtype_named(torch);
    if (!named || size_of(*named) != size) return std::nullopt;
    out.dtype = *named;
    return out;
  }
  switch (H5Tget_class(type)) {
    case H5T_INTEGER: {
      const bool sign = H5Tget_sign(type) == H5T_SGN_2;
      if (size == 1) out.dtype = sign ? DType::I8 : DType::U8;
      else if (size == 2) out.dtype = sign ? DType::I16 : DType::U16;
      else if (size == 4) out.dtype = sign ? DType::I32 : DType::U32;
      else if (size == 8) out.dtype = sign ? DType::I64 : DType::U64;
      else return std::nullopt;
      return out;
    }
    case H5T_FLOAT:
      if (size == 2) out.dtype = DType::F16;
      else if (size == 4) out.dtype = DType::F32;
      else if (size == 8) out.dtype = DType::F64;
      else return std::nullopt;
      return out;
    case H5T_ENUM:
      if (size != 1 || H5Tget_nmembers(type) != 2) return std::nullopt;
      out.dtype = DType::Bool;
      return out;
    default: return std::nullopt;
  }
}

Handle stored_type(DType dtype) {
  const auto copy = [](hid_t type) { return Handle(H5Tcopy(type)); };
  switch (dtype) {
    case DType::F64: return copy(H5T_IEEE_F64LE);
    case DType::F32: return copy(H5T_IEEE_F32LE);
    case DType::F16: return half();
    case DType::Bool: return boolean();
    case DType::I64: return copy(H5T_STD_I64LE);
    case DType::I32: return copy(H5T_STD_I32LE);
    case DType::I16: return copy(H5T_STD_I16LE);
    case DType::I8: return copy(H5T_STD_I8LE);
    default: break;
  }
  switch (size_of(dtype)) {
    case 1: return copy(H5T_STD_U8LE);
    case 2: return copy(H5T_STD_U16LE);
    case 4: return copy(H5T_STD_U32LE);
    case 8: return copy(H5T_STD_U64LE);
    default: shard::fail(shard::Code::BadFormat, "HDF5: {} has no place there", name(dtype));
  }
}

std::string torch_attribute(DType dtype) {
  switch (dtype) {
    case DType::F64: case DType::F32: case DType::F16: case DType::Bool:
    case DType::I64: case DType::I32: case DType::I16: case DType::I8:
    case DType::U64: case DType::U32: case DType::U16: case DType::U8: return {};
    default: return std::string(shard::torch_name(dtype));
  }
}

std::string text_attribute(hid_t object, const char* name) {
  if (H5Aexists(object, name) <= 0) return {};
  const Handle attribute(H5Aopen(object, name, H5P_DEFAULT));
  const Handle type(H5Aget_type(attribute)), space(H5Aget_space(attribute));
  if (attribute < 0 || H5Tget_class(type) != H5T_STRING || H5Sget_simple_extent_npoints(space) != 1) return {};
  if (H5Tis_variable_str(type) > 0) {
    char* text = nullptr;
    const Handle memory(H5Tcopy(type));
    if (H5Aread(attribute, memory, &text) < 0 || !text) return {};
    std::string out(text);
    H5free_memory(text);
    return out;
  }
  const auto size = H5Tget_size(type);
  if (size == 0 || size > kLongestText) return {};
  std::string out(size, '\0');
  if (H5Aread(attribute, type, out.data()) < 0) return {};
  out.resize(std::min(out.find('\0'), out.size()));
  return out;
}

void set_attribute(hid_t object, const char* name, const std::string& text) {
  const Handle type(H5Tcopy(H5T_C_S1)), space(H5Screate(H5S_SCALAR));
  H5Tset_size(type, H5T_VARIABLE);  // what h5py reads as str
  H5Tset_cset(type, H5T_CSET_UTF8);
  const auto attribute = checked(H5Acreate2(object, name, type, space, H5P_DEFAULT, H5P_DEFAULT), shard::Code::Io, fmt::format("HDF5: attribute '{}' cannot be written", name));
  const char* pointer = text.c_str();
  H5Awrite(attribute, type, &pointer);
}

}  // namespace formats::hdf5
