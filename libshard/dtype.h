// Element types of torch and safetensors: their names, sizes, and which of them are floating point.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

namespace shard {

/// Packed types (F4E2M1x2) are carried as bytes: one element is one byte.
enum class DType : std::uint8_t {
  F64, F32, F16, BF16,
  F8E4M3, F8E5M2, F8E8M0, F8E4M3FNUZ, F8E5M2FNUZ, F4E2M1x2,
  I64, I32, I16, I8, U64, U32, U16, U8, Bool, C64, C128,
};

std::size_t size_of(DType dtype);                            ///< bytes of one element
bool is_floating(DType dtype);                               ///< has NaN or infinity, or may be cast as a number
std::string_view name(DType dtype);                          ///< "bf16", "f32", "f8_e4m3", "i64", "bool" …
std::string_view torch_name(DType dtype);                    ///< "bfloat16", "float8_e4m3fn" …
std::string_view safetensors_name(DType dtype);              ///< "BF16", "F8_E4M3" …; "" where it has none
std::optional<DType> dtype_named(std::string_view name);     ///< of any of the three spellings

}  // namespace shard
