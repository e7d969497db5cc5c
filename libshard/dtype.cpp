// One table of element types.
#include "libshard/dtype.h"

#include <array>

namespace shard {
namespace {

struct Row {
  DType dtype;
  std::size_t size;
  bool floating;
  std::string_view name, torch, safetensors;
};

constexpr std::array kRows{
    Row{DType::F64, 8, true, "f64", "float64", "F64"},
    Row{DType::F32, 4, true, "f32", "float32", "F32"},
    Row{DType::F16, 2, true, "f16", "float16", "F16"},
    Row{DType::BF16, 2, true, "bf16", "bfloat16", "BF16"},
    Row{DType::F8E4M3, 1, true, "f8_e4m3", "float8_e4m3fn", "F8_E4M3"},
    Row{DType::F8E5M2, 1, true, "f8_e5m2", "float8_e5m2", "F8_E5M2"},
    Row{DType::F8E8M0, 1, false, "f8_e8m0", "float8_e8m0fnu", "F8_E8M0"},
    Row{DType::F8E4M3FNUZ, 1, false, "f8_e4m3fnuz", "float8_e4m3fnuz", "F8_E4M3FNUZ"},
    Row{DType::F8E5M2FNUZ, 1, false, "f8_e5m2fnuz", "float8_e5m2fnuz", "F8_E5M2FNUZ"},
    Row{DType::F4E2M1x2, 1, false, "f4_e2m1x2", "float4_e2m1fn_x2", "F4"},
    Row{DType::I64, 8, false, "i64", "int64", "I64"},
    Row{DType::I32, 4, false, "i32", "int32", "I32"},
    Row{DType::I16, 2, false, "i16", "int16", "I16"},
    Row{DType::I8, 1, false, "i8", "int8", "I8"},
    Row{DType::U64, 8, false, "u64", "uint64", "U64"},
    Row{DType::U32, 4, false, "u32", "uint32", "U32"},
    Row{DType::U16, 2, false, "u16", "uint16", "U16"},
    Row{DType::U8, 1, false, "u8", "uint8", "U8"},
    Row{DType::Bool, 1, false, "bool", "bool", "BOOL"},
    Row{DType::C64, 8, false, "c64", "complex64", "C64"},
    Row{DType::C128, 16, false, "c128", "complex128", ""},
};

const Row& row(DType dtype) { return kRows[static_cast<std::size_t>(dtype)]; }

}  // namespace

std::size_t size_of(DType dtype) { return row(dtype).size; }
bool is_floating(DType dtype) { return row(dtype).floating; }
std::string_view name(DType dtype) { return row(dtype).name; }
std::string_view torch_name(DType dtype) { return row(dtype).torch; }
std::string_view safetensors_name(DType dtype) { return row(dtype).safetensors; }

std::optional<DType> dtype_named(std::string_view name) {
  for (const auto& row : kRows)
    if (!name.empty() && (row.name == name || row.torch == name || row.safetensors == name)) return row.dtype;
  return std::nullopt;
}

}  // namespace shard
