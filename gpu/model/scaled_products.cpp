// A library that reads scales in another order than its documentation says would give wrong numbers and no error, so it is asked before it is trusted.
#include "gpu/model/scaled_products.h"

#include "gpu/runtime.h"
#include "libshard/error.h"
#include "lm/scaled_blocks.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace gpu {
namespace {

using Index = std::int64_t;
using shard::DType;

MatmulShape shape_of(const ScaledRows& x, const ScaledWeight& w, const View& out) {
  MatmulShape shape;
  shape.rows = x.numbers.rows, shape.columns = w.numbers.rows, shape.inner = x.numbers.columns;
  shape.type = shape.w_type = DType::F8E4M3, shape.out_type = out.type;
  shape.x_pitch = x.numbers.stride, shape.w_pitch = w.numbers.stride, shape.out_pitch = out.stride;
  shape.scaled_blocks = true;
  return shape;
}

/// Whether the library's layouts are these.
bool fits(const ScaledRows& x, const ScaledWeight& w, const View& bias) {
  const auto inner = x.numbers.columns, blocks = inner / lm::kScaleBlock;
  return !bias && x.first == 0 && w.first_row == 0 && inner % lm::kScaleBlock == 0 && blocks % 4 == 0 && w.scale_pitch == blocks && x.scale_pitch == x.numbers.rows &&
         x.numbers.rows % 4 == 0 && w.numbers.rows % 16 == 0 && w.numbers.stride % 16 == 0 && reinterpret_cast<std::uintptr_t>(w.numbers.data) % 16 == 0 &&
         reinterpret_cast<std::uintptr_t>(w.scales) % 16 == 0 && reinterpret_cast<std::uintptr_t>(x.scales) % 16 == 0;
}

void by_library(Matmul& library, const ScaledRows& x, const ScaledWeight& w, const View& out, StreamView on) {
  library(shape_of(x, w, out), {x.numbers.data, w.numbers.data, nullptr, out.data, 1, 0, x.scales, w.scales}, on);
}

/// The largest difference of two products whose every scale differs from the others, against the largest number.
double disagreement(Matmul& library, StreamView on) {
  constexpr Index kRows = 20, kOutputs = 272, kInputs = 1024, kBlocks = kInputs / lm::kScaleBlock;  // outputs end within a block
  DeviceBuffer numbers(static_cast<std::size_t>((kRows + kOutputs) * kInputs)), scales(static_cast<std::size_t>(kBlocks * kRows + kBlocks * ((kOutputs + 127) / 128)) * sizeof(float)),
      results(static_cast<std::size_t>(2 * kRows * kOutputs) * sizeof(float));
  std::vector<std::uint8_t> host(numbers.size());
  std::vector<float> factors(scales.size() / sizeof(float));
  std::uint32_t seed = 1;
  const auto next = [&] { return (seed = seed * 1664525u + 1013904223u) >> 16; };
  for (auto& number : host) number = static_cast<std::uint8_t>((next() & 0x80) | (0x20 + next() % 0x20));  // 2⁻³ to 2, of either sign
  for (auto& factor : factors) factor = 0.5f + static_cast<float>(next() % 4096) / 1024;
  gpu::to_device(numbers.data(), host.data(), host.size(), on);
  gpu::to_device(scales.data(), factors.data(), scales.size(), on);
  auto* const all_scales = reinterpret_cast<float*>(scales.data());
  const ScaledRows x{{numbers.data(), DType::F8E4M3, kRows, kInputs, kInputs}, all_scales, kRows, 0};
  const ScaledWeight w{{numbers.data() + kRows * kInputs, DType::F8E4M3, kOutputs, kInputs, kInputs}, all_scales + kBlocks * kRows, kBlocks, 0, 0};
  const View ours{results.data(), DType::F32, kRows, kOutputs, kOutputs}, theirs{ours.at(kRows, 0), DType::F32, kRows, kOutputs, kOutputs};
  scaled_linear(on, x, w, {}, ours);
  by_library(library, x, w, theirs, on);
  std::vector<float> found(results.size() / sizeof(float));
  gpu::to_host(found.data(), results.data(), results.size(), on);
  gpu::wait(on);
  const auto half = found.size() / 2;
  float most = 0, apart = 0;
  for (std::size_t i = 0; i < half; ++i) {
    most = std::max(most, std::abs(found[i]));
    const auto difference = std::abs(found[i] - found[half + i]);
    if (!(difference <= apart)) apart = difference;
  }
  return static_cast<double>(apart) / static_cast<double>(most);
}

}  // namespace

ScaledProducts::ScaledProducts(Matmul* library, StreamView on) : library_(library), by_("own kernels") {
  if (!library_) return;
  constexpr double kMostApart = 5e-3;  // tensor cores of 9.0 keep 14 bits of the sum of a block
  try {
    const auto apart = disagreement(*library_, on);
    if (apart <= kMostApart) by_ = "cuBLASLt " + library_->version() + " and, for shapes that it does not take, own kernels";
    else library_ = nullptr, by_ = fmt::format("own kernels: cuBLASLt's first product differs by {:.1e} of its largest number", apart);
  } catch (const shard::Error& error) {
    library_ = nullptr;
    by_ = fmt::format("own kernels: {}", error.what());
  }
}

void ScaledProducts::operator()(const ScaledRows& x, const ScaledWeight& w, const View& bias, const View& out, StreamView on) {
  if (library_ && fits(x, w, bias) && !refused_.contains(shape_of(x, w, out))) {
    try {
      return by_library(*library_, x, w, out, on);
    } catch (const shard::Error&) {  // a shape that it has no kernel for, or a lost device, which the next call tells
      refused_.insert(shape_of(x, w, out));
    }
  }
  scaled_linear(on, x, w, bias, out);
}

}  // namespace gpu
