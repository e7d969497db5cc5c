// One question in each direction; h5py's conventions for half and bool.
#include "formats/hdf5/types.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <span>
#include <vector>

namespace formats::hdf5 {
namespace {

using shard::DType;

constexpr std::uint64_t kLongestText = 1 << 20, kLongestHeap = 64 << 20, kFarthest = 1ull << 62;

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

/// A float's fields by bit: where sign, exponent and mantissa lie, their sizes, the exponent's bias.
struct FloatFields {
  DType dtype;
  std::size_t size, sign, exponent, exponent_bits, mantissa_bits, bias;
};
constexpr FloatFields kFloats[] = {{DType::F64, 8, 63, 52, 11, 52, 1023}, {DType::F32, 4, 31, 23, 8, 23, 127}, {DType::F16, 2, 15, 10, 5, 10, 15},
                                   {DType::BF16, 2, 15, 7, 8, 7, 127}, {DType::F8E5M2, 1, 7, 2, 5, 2, 15}};

std::optional<DType> float_type(hid_t type, std::size_t size) {
  std::size_t sign = 0, exponent = 0, exponent_bits = 0, mantissa = 0, mantissa_bits = 0;
  if (H5Tget_fields(type, &sign, &exponent, &exponent_bits, &mantissa, &mantissa_bits) < 0 || mantissa != 0 || H5Tget_norm(type) != H5T_NORM_IMPLIED) return std::nullopt;
  for (const auto& one : kFloats)
    if (size == one.size && sign == one.sign && exponent == one.exponent && exponent_bits == one.exponent_bits && mantissa_bits == one.mantissa_bits && H5Tget_ebias(type) == one.bias) return one.dtype;
  return std::nullopt;
}

std::optional<DType> integer_type(hid_t type, std::size_t size) {
  const bool sign = H5Tget_sign(type) == H5T_SGN_2;
  switch (size) {
    case 1: return sign ? DType::I8 : DType::U8;
    case 2: return sign ? DType::I16 : DType::U16;
    case 4: return sign ? DType::I32 : DType::U32;
    case 8: return sign ? DType::I64 : DType::U64;
    default: return std::nullopt;
  }
}

/// h5py's bool: an enumeration in one byte of FALSE, which is 0, and TRUE, which is 1.
bool is_bool(hid_t type) {
  if (H5Tget_size(type) != 1 || H5Tget_nmembers(type) != 2) return false;
  signed char no = -1, yes = -1;
  return H5Tenum_valueof(type, "FALSE", &no) >= 0 && H5Tenum_valueof(type, "TRUE", &yes) >= 0 && no == 0 && yes == 1;
}

/// What the stored type itself says; every bit of an element belongs to the number.
std::optional<DType> plain_type(hid_t type, std::size_t size) {
  const auto kind = H5Tget_class(type);
  if (kind == H5T_ENUM) return is_bool(type) ? std::optional(DType::Bool) : std::nullopt;
  if (kind != H5T_INTEGER && kind != H5T_FLOAT) return std::nullopt;
  const auto order = H5Tget_order(type);
  if (H5Tget_offset(type) != 0 || H5Tget_precision(type) != 8 * size || (order != H5T_ORDER_LE && order != H5T_ORDER_BE)) return std::nullopt;
  return kind == H5T_FLOAT ? float_type(type, size) : integer_type(type, size);
}

/// h5py's complex number: a compound of r and i.
bool is_complex(hid_t type) { return H5Tget_nmembers(type) == 2 && H5Tget_member_index(type, "r") == 0 && H5Tget_member_index(type, "i") == 1 && H5Tget_member_class(type, 0) == H5T_FLOAT; }

std::string described(hid_t type, H5T_class_t kind, std::size_t size) {
  const auto bits = H5Tget_precision(type);
  switch (kind) {
    case H5T_INTEGER: return fmt::format("integers of {} bits in {} bytes, which are none of ours", bits, size);
    case H5T_FLOAT: return fmt::format("floats of {} bits in {} bytes, whose fields are none of ours", bits, size);
    case H5T_ENUM: return "an enumeration other than FALSE and TRUE";
    case H5T_BITFIELD: return "bit fields";
    case H5T_ARRAY: return "arrays";
    case H5T_COMPOUND: return is_complex(type) ? "complex numbers" : "compounds";
    default: return "no numbers";
  }
}

std::uint64_t little(const std::byte* from, std::size_t bytes) {
  std::uint64_t out = 0;
  for (std::size_t i = bytes; i-- > 0;) out = out << 8 | std::to_integer<std::uint64_t>(from[i]);
  return out;
}

bool read_at(hid_t object, std::uint64_t offset, std::span<std::byte> into) {
  const Handle file(H5Iget_file_id(object));
  hsize_t block = 0;
  const Handle list(H5Fget_create_plist(file));
  void* driver = nullptr;
  if (H5Pget_userblock(list, &block) < 0 || H5Fget_vfd_handle(file, H5P_DEFAULT, &driver) < 0 || !driver || offset > kFarthest) return false;
  const auto at = static_cast<off_t>(offset + block);
  return pread(*static_cast<const int*>(driver), into.data(), into.size(), at) == static_cast<ssize_t>(into.size());
}

/// A text of any length lies in a heap that the library reads without looking where it ends (a damaged one makes it crash),
/// so only where that is comes from the library: length, address of the collection, number in it.
std::string variable_text(hid_t attribute, const std::string& bad) {
  const auto need = [&](bool good) { shard::require(good, shard::Code::BadFormat, [&] { return bad + ", or is damaged"; }); };
  std::size_t address_bytes = 0, length_bytes = 0;
  {
    const Handle file(H5Iget_file_id(attribute));
    const Handle list(H5Fget_create_plist(file));
    need(H5Pget_sizes(list, &address_bytes, &length_bytes) >= 0 && address_bytes == 8 && length_bytes == 8);
  }
  std::array<std::byte, 16> pointer{};
  const Handle raw(H5Tcreate(H5T_OPAQUE, pointer.size()));
  need(H5Aread(attribute, raw, pointer.data()) >= 0);
  const auto length = little(pointer.data(), 4), address = little(pointer.data() + 4, 8), number = little(pointer.data() + 12, 4);
  if (length == 0) return {};
  std::array<std::byte, 16> head{};
  need(length <= kLongestText && number > 0 && number <= 0xffff && read_at(attribute, address, head));
  const auto size = little(head.data() + 8, 8);
  need(std::memcmp(head.data(), "GCOL\1", 5) == 0 && size >= 32 && size <= kLongestHeap);
  std::vector<std::byte> heap(size);
  need(read_at(attribute, address, heap));
  for (std::uint64_t at = 16; at + 16 <= size;) {
    const auto index = little(heap.data() + at, 2), bytes = little(heap.data() + at + 8, 8);
    if (index == 0) break;  // what is free
    at += 16;
    need(bytes <= size - at);
    if (index == number) {
      need(bytes == length);
      return std::string(reinterpret_cast<const char*>(heap.data() + at), length);
    }
    at += (bytes + 7) / 8 * 8;
  }
  need(false);
  return {};
}

}  // namespace

Elements type_of(hid_t dataset, const std::string& where) {
  const Handle type(H5Dget_type(dataset));
  const auto kind = H5Tget_class(type);
  const auto size = H5Tget_size(type);
  const bool big_endian = H5Tget_order(type) == H5T_ORDER_BE && size > 1;
  const auto plain = plain_type(type, size);
  const auto refused = [](std::string what) { return Elements{std::nullopt, std::move(what)}; };
  if (H5Aexists(dataset, "torch_dtype") > 0) {
    const auto torch = text_attribute(dataset, "torch_dtype", where);
    if (!torch) return refused("its attribute torch_dtype is no text");
    const auto named = shard::dtype_named(*torch);
    if (!named) return refused(fmt::format("torch_dtype is '{}', which is no type", *torch));
    const bool bits = kind == H5T_INTEGER && plain && size_of(*named) == size;
    if (!bits && plain != named) return refused(fmt::format("torch_dtype is {}; the elements are {}", *torch, plain ? std::string(name(*plain)) : described(type, kind, size)));
    return {Type{*named, big_endian}, {}};
  }
  if (plain) return {Type{*plain, big_endian}, {}};
  switch (kind) {
    case H5T_INTEGER: case H5T_FLOAT: case H5T_ENUM: case H5T_BITFIELD: case H5T_ARRAY: return refused(fmt::format("its elements are {}", described(type, kind, size)));
    case H5T_COMPOUND: return is_complex(type) ? refused(fmt::format("its elements are {}", described(type, kind, size))) : Elements{};
    default: return {};
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

std::optional<std::string> text_attribute(hid_t object, const char* name, const std::string& where) {
  const auto exists = H5Aexists(object, name);
  if (exists == 0) return std::nullopt;
  const auto bad = [&](const char* what) { return fmt::format("{}: attribute '{}' {}", where, name, what); };
  shard::require(exists > 0, shard::Code::BadFormat, [&] { return bad("cannot be looked for"); });
  const auto attribute = checked(H5Aopen(object, name, H5P_DEFAULT), shard::Code::BadFormat, bad("cannot be opened"));
  const Handle type(H5Aget_type(attribute)), space(H5Aget_space(attribute));
  if (H5Tget_class(type) != H5T_STRING || H5Sget_simple_extent_npoints(space) != 1) return std::nullopt;
  const bool variable = H5Tis_variable_str(type) > 0;
  const auto size = H5Tget_size(type);
  shard::require(variable || (size > 0 && size <= kLongestText), shard::Code::BadFormat, [&] { return bad("is a text beyond reason"); });
  std::string out = variable ? variable_text(attribute, bad("cannot be read")) : std::string(size, '\0');
  if (!variable) shard::require(H5Aread(attribute, type, out.data()) >= 0, shard::Code::BadFormat, [&] { return bad("cannot be read"); });
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
