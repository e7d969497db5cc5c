// What each op means, from lm/cpu, and the way of its inputs and outputs to device memory and back.
#pragma once

#include "gpu/runtime.h"
#include "gpu/view.h"
#include "libshard/float_bits.h"
#include "lm/cpu/numbers.h"
#include "lm/cpu/ops.h"

#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

namespace meaning {

using lm::Index;
using lm::Tensor;

/// One compute mode: how the CPU rounds, and the type in which the device stores activations.
struct Mode {
  lm::Compute compute;
  shard::DType type;
  bool bf16() const { return compute == lm::Compute::Bf16; }
  lm::cpu::Context on() const { return {compute, 1}; }
};
inline const Mode kModes[] = {{lm::Compute::F32, shard::DType::F32}, {lm::Compute::Bf16, shard::DType::BF16}};

inline std::mt19937& generator() {
  static std::mt19937 one(7);
  return one;
}
inline float random_value(float spread = 1) { return std::normal_distribution<float>(0, spread)(generator()); }
inline Index random_below(Index n) { return std::uniform_int_distribution<Index>(0, n - 1)(generator()); }

/// Numbers that the mode's type holds.
inline Tensor random_tensor(const Mode& mode, Index rows, Index columns, float spread = 1) {
  Tensor out(rows, columns);
  for (auto& value : out.values()) value = random_value(spread);
  lm::cpu::round_values(mode.on(), out.values());
  return out;
}

/// A vector or matrix that the CPU ops take as a weight.
inline lm::Weight weight_of(const Tensor& values, shard::DType type) {
  const auto count = values.values().size();
  std::shared_ptr<std::byte> memory(new std::byte[count * 4], [](std::byte* mine) { delete[] mine; });
  for (std::size_t i = 0; i < count; ++i) {
    const auto bits = std::bit_cast<std::uint32_t>(values.values()[i]);
    if (type == shard::DType::F32) shard::store(memory.get() + 4 * i, bits);
    else shard::store(memory.get() + 2 * i, static_cast<std::uint16_t>(bits >> 16));
  }
  return {memory, memory.get(), type, values.rows(), values.columns(), values.columns()};
}

inline gpu::Stream& stream() {
  static gpu::Stream one;
  return one;
}

/// A matrix in device memory; `stride` wider than its columns where a test wants gaps, which hold NaN.
class OnDevice {
 public:
  OnDevice(Index rows, Index columns, shard::DType type, Index stride = 0) {
    stride = stride ? stride : columns;
    memory_ = gpu::DeviceBuffer(static_cast<std::size_t>(rows * stride) * shard::size_of(type));
    view_ = {memory_.data(), type, rows, columns, stride};
    gpu::set_bytes(memory_.data(), 0xff, memory_.size(), stream());
    stream().wait();
  }
  OnDevice(const Tensor& values, shard::DType type, Index stride = 0) : OnDevice(values.rows(), values.columns(), type, stride) { put(values); }
  const gpu::View& view() const { return view_; }
  void put(const Tensor& values) const {
    std::vector<std::byte> all(memory_.size(), std::byte{0xff});
    const auto item = shard::size_of(view_.type);
    for (Index r = 0; r < view_.rows; ++r)
      for (Index c = 0; c < view_.columns; ++c) {
        auto* to = all.data() + static_cast<std::size_t>(r * view_.stride + c) * item;
        const auto bits = std::bit_cast<std::uint32_t>(values.row(r)[c]);
        if (view_.type == shard::DType::F32) shard::store(to, bits);
        else if (view_.type == shard::DType::BF16) shard::store(to, static_cast<std::uint16_t>(shard::narrow<shard::kBF16>(bits)));
        else if (view_.type == shard::DType::F16) shard::store(to, static_cast<std::uint16_t>(shard::narrow<shard::kF16>(bits)));
        else
          shard::store(to, static_cast<std::uint8_t>(view_.type == shard::DType::F8E4M3 ? shard::narrow<shard::kE4M3>(bits)
                                                                                        : shard::narrow<shard::kE5M2>(bits)));
      }
    gpu::to_device(memory_.data(), all.data(), all.size(), stream());
    stream().wait();
  }
  Tensor get() const {
    std::vector<std::byte> all(memory_.size());
    gpu::to_host(all.data(), memory_.data(), all.size(), stream());
    stream().wait();
    Tensor out(view_.rows, view_.columns);
    const auto item = shard::size_of(view_.type);
    for (Index r = 0; r < view_.rows; ++r)
      for (Index c = 0; c < view_.columns; ++c) {
        const auto* from = all.data() + static_cast<std::size_t>(r * view_.stride + c) * item;
        std::uint32_t bits;
        if (view_.type == shard::DType::F32) bits = shard::load<std::uint32_t>(from);
        else if (view_.type == shard::DType::BF16) bits = static_cast<std::uint32_t>(shard::load<std::uint16_t>(from)) << 16;
        else if (view_.type == shard::DType::F16) bits = shard::widen<shard::kF16>(shard::load<std::uint16_t>(from));
        else
          bits = view_.type == shard::DType::F8E4M3 ? shard::widen<shard::kE4M3>(shard::load<std::uint8_t>(from))
                                                    : shard::widen<shard::kE5M2>(shard::load<std::uint8_t>(from));
        out.row(r)[c] = std::bit_cast<float>(bits);
      }
    return out;
  }

 private:
  gpu::DeviceBuffer memory_;
  gpu::View view_;
};

/// Plain values in device memory.
template <typename T>
class Values {
 public:
  explicit Values(std::size_t count) : memory_(std::max<std::size_t>(1, count * sizeof(T))), count_(count) {}
  explicit Values(const std::vector<T>& values) : Values(values.size()) {
    gpu::to_device(memory_.data(), values.data(), values.size() * sizeof(T), stream());
    stream().wait();
  }
  T* data() const { return reinterpret_cast<T*>(memory_.data()); }
  std::vector<T> get() const {
    std::vector<T> out(count_);
    gpu::to_host(out.data(), memory_.data(), count_ * sizeof(T), stream());
    stream().wait();
    return out;
  }

 private:
  gpu::DeviceBuffer memory_;
  std::size_t count_;
};

/// The largest |a − b| over the largest |b|; infinite where only one is a number.
inline double worst(const Tensor& a, const Tensor& b) {
  REQUIRE(a.rows() == b.rows());
  REQUIRE(a.columns() == b.columns());
  double most = 0, size = 1e-30;
  for (std::size_t i = 0; i < a.values().size(); ++i) {
    const double x = a.values()[i], y = b.values()[i];
    if (x == y || (std::isnan(x) && std::isnan(y))) continue;
    const double apart = std::abs(x - y);
    most = std::isfinite(apart) ? std::max(most, apart) : INFINITY;
  }
  for (const auto value : b.values())
    if (std::isfinite(value)) size = std::max(size, std::abs(static_cast<double>(value)));
  return most / size;
}

/// The bound of an op that rounds once: f32's is given; a bf16 result may fall to the other side of a tie, at most 2^−7 of its own size.
inline double bound(const Mode& mode, double f32) { return mode.bf16() ? 1.0 / 128 : f32; }

}  // namespace meaning
