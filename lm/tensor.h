// Activations and weights as the ops see them.
#pragma once

#include "libshard/box.h"
#include "libshard/dtype.h"
#include "lm/buffer.h"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

namespace lm {

using shard::Index;

/// What products take and what every op's result is rounded to. In Bf16 the host keeps activations in f32, each value rounded
/// to bf16 where torch would store it; sums are f32 in all. Fp8 is Bf16, but that layers' linears see both sides in e4m3 with a
/// scale for each block (lm/scaled_blocks.h).
enum class Compute { F32, Bf16, Fp8 };
/// Whether results are rounded to bf16.
constexpr bool rounds_to_bf16(Compute compute) { return compute != Compute::F32; }
/// "f32", "bf16", "fp8".
constexpr std::optional<Compute> compute_named(std::string_view name) {
  return name == "f32" ? std::optional(Compute::F32) : name == "bf16" ? std::optional(Compute::Bf16) : name == "fp8" ? std::optional(Compute::Fp8) : std::nullopt;
}

/// Row-major [rows, columns], owned, not zeroed: f32 on the host. A device chooses memory and type, which its ops alone read.
class Tensor {
 public:
  Tensor() = default;
  Tensor(Index rows, Index columns) : Tensor(take_buffer(static_cast<std::size_t>(rows * columns) * sizeof(float)), shard::DType::F32, rows, columns) {}
  Tensor(std::shared_ptr<std::byte> memory, shard::DType type, Index rows, Index columns)
      : rows_(rows), columns_(columns), type_(type), memory_(std::move(memory)), data_(reinterpret_cast<float*>(memory_.get())) {}
  Tensor(Tensor&&) = default;
  Tensor& operator=(Tensor&&) = default;
  Index rows() const { return rows_; }
  Index columns() const { return columns_; }
  shard::DType dtype() const { return type_; }
  std::byte* data() const { return memory_.get(); }
  // What follows is for the host.
  float* row(Index r) { return data_ + r * columns_; }
  const float* row(Index r) const { return data_ + r * columns_; }
  std::span<float> values() { return {data_, static_cast<std::size_t>(rows_ * columns_)}; }
  std::span<const float> values() const { return {data_, static_cast<std::size_t>(rows_ * columns_)}; }
  Tensor clone() const {
    Tensor out(rows_, columns_);
    for (std::size_t i = 0; i < values().size(); ++i) out.data_[i] = data_[i];
    return out;
  }

 private:
  Index rows_ = 0, columns_ = 0;
  shard::DType type_ = shard::DType::F32;
  std::shared_ptr<std::byte> memory_;  // never shared: copies are made by clone()
  float* data_ = nullptr;
};

/// Token ids, labels or positions, and the copy that a device works from.
struct Ids {
  std::vector<Index> host;
  std::shared_ptr<std::byte> device;  ///< int64
};

/// A view of a weight [rows, columns] (a vector has one row); keeps its memory alive.
struct Weight {
  std::shared_ptr<const std::byte> owner;
  const std::byte* data = nullptr;
  shard::DType dtype = shard::DType::F32;  ///< F32 or BF16; F8E4M3 where scales lie beside it
  Index rows = 0, columns = 0, stride = 0; ///< elements from one row to the next
  Index first_row = 0, first_column = 0;   ///< of the whole weight, where this is a part of it

  explicit operator bool() const { return data != nullptr; }
  Weight row_range(Index lo, Index count) const {
    auto out = *this;
    out.data += static_cast<std::size_t>(lo * stride) * size_of(dtype);
    out.rows = count;
    out.first_row += lo;
    return out;
  }
  Weight column_range(Index lo, Index count) const {
    auto out = *this;
    out.data += static_cast<std::size_t>(lo) * size_of(dtype);
    out.columns = count;
    out.first_column += lo;
    return out;
  }
  float at(Index row, Index column) const {
    const auto* element = data + static_cast<std::size_t>(row * stride + column) * size_of(dtype);
    if (dtype == shard::DType::F32) {
      float value;
      __builtin_memcpy(&value, element, sizeof value);
      return value;
    }
    std::uint16_t bits;
    __builtin_memcpy(&bits, element, sizeof bits);
    const auto wide = static_cast<std::uint32_t>(bits) << 16;
    float value;
    __builtin_memcpy(&value, &wide, sizeof value);
    return value;
  }
};

}  // namespace lm
