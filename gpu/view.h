// Rows of numbers in device memory as ops see them. Plain values: a view owns nothing.
#pragma once

#include "libshard/dtype.h"

#include <cstddef>
#include <cstdint>

namespace gpu {

/// [rows, columns]; `stride` elements from one row to the next. A vector has one row. No data: there is none (a linear without bias).
struct View {
  std::byte* data = nullptr;
  shard::DType type = shard::DType::F32;
  std::int64_t rows = 0, columns = 0, stride = 0;

  explicit operator bool() const { return data != nullptr; }
  View row_range(std::int64_t lo, std::int64_t count) const { return {at(lo, 0), type, count, columns, stride}; }
  View column_range(std::int64_t lo, std::int64_t count) const { return {at(0, lo), type, rows, count, stride}; }
  std::byte* at(std::int64_t row, std::int64_t column) const {
    return data + (row * stride + column) * static_cast<std::int64_t>(shard::size_of(type));
  }
};

}  // namespace gpu
