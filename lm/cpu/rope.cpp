// Tables of cos and sin, computed in f32 as torch does, and the turn itself.
#include "lm/cpu/numbers.h"
#include "lm/cpu/ops.h"
#include "libshard/error.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace lm::cpu {
namespace {

using shard::RopeConfig;

std::vector<float> powers(double base, Index dim) {
  std::vector<float> out;
  for (Index i = 0; i < (dim + 1) / 2; ++i) {  // an odd number of lanes turns one more, as torch.arange(0, dim, 2) makes it
    const auto exponent = static_cast<float>(2 * i) / static_cast<float>(dim);
    out.push_back(1.0f / static_cast<float>(std::pow(base, static_cast<double>(exponent))));
  }
  return out;
}

void llama3(const RopeConfig& config, std::vector<float>& inv) {
  const auto low = config.original_max_position / config.low_freq_factor, high = config.original_max_position / config.high_freq_factor;
  for (auto& value : inv) {
    const auto wave = 2 * std::numbers::pi / static_cast<double>(value);
    if (wave < high) continue;
    const auto slow = static_cast<double>(value) / config.factor;
    if (wave > low) {
      value = static_cast<float>(slow);
      continue;
    }
    const auto smooth = (config.original_max_position / wave - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor);
    value = static_cast<float>((1 - smooth) * slow + smooth * static_cast<double>(value));
  }
}

void yarn(const RopeConfig& config, std::vector<float>& inv) {
  const auto dim = static_cast<double>(config.dim);
  const auto lane = [&](double turns) {
    return dim * std::log(config.original_max_position / (turns * 2 * std::numbers::pi)) / (2 * std::log(config.base));
  };
  auto low = lane(config.beta_fast), high = lane(config.beta_slow);
  if (config.truncate) low = std::floor(low), high = std::ceil(high);
  low = std::max(low, 0.0);
  high = std::min(high, dim - 1);
  if (low == high) high += 0.001;
  for (std::size_t i = 0; i < inv.size(); ++i) {
    const auto ramp = std::clamp((static_cast<double>(i) - low) / (high - low), 0.0, 1.0);
    const auto extra = static_cast<double>(inv[i]);
    inv[i] = static_cast<float>(extra / config.factor * ramp + extra * (1 - ramp));
  }
}

std::vector<float> frequencies(const RopeConfig& config, Index length) {
  auto base = config.base;
  const auto dim = static_cast<double>(config.dim);
  if (config.type == RopeConfig::Type::Dynamic) {
    const auto reach = std::max(static_cast<double>(length), config.max_position);
    base *= std::pow(config.factor * reach / config.max_position - (config.factor - 1), dim / (dim - 2));
  }
  auto inv = powers(base, config.dim);
  if (config.type == RopeConfig::Type::Linear)
    for (auto& value : inv) value /= static_cast<float>(config.factor);
  if (config.type == RopeConfig::Type::Llama3) llama3(config, inv);
  if (config.type == RopeConfig::Type::Yarn) yarn(config, inv);
  if (config.type == RopeConfig::Type::LongRope) {
    const auto& factors = static_cast<double>(length) > config.original_max_position ? config.long_factor : config.short_factor;
    shard::require(factors.size() == inv.size(), shard::Code::Mismatch,
                   [&] { return fmt::format("rope_scaling: {} factors for {} pairs of lanes", factors.size(), inv.size()); });
    for (std::size_t i = 0; i < inv.size(); ++i) inv[i] /= static_cast<float>(factors[i]);
  }
  return inv;
}

SHARD_CLONES void turn(float* x, const float* cosine, const float* sine, Index half, bool interleaved, bool bf16) {
  using cpu::round_bf16;
  const Index step = interleaved ? 2 : 1;
  float* y = interleaved ? x + 1 : x + half;
  if (bf16) {
    for (Index i = 0; i < half; ++i) {
      const float a = x[i * step], b = y[i * step];
      x[i * step] = round_bf16(round_bf16(a * cosine[i]) - round_bf16(b * sine[i]));
      y[i * step] = round_bf16(round_bf16(b * cosine[i]) + round_bf16(a * sine[i]));
    }
  } else {
    for (Index i = 0; i < half; ++i) {
      const float a = x[i * step], b = y[i * step];
      x[i * step] = a * cosine[i] - b * sine[i];
      y[i * step] = b * cosine[i] + a * sine[i];
    }
  }
}

}  // namespace

RopeTable rope_table(const RopeConfig& config, Index length) {
  RopeTable out;
  if (config.type == RopeConfig::Type::None || config.dim < 2) return out;
  const auto inv = frequencies(config, length);
  out.positions = length;
  out.half = static_cast<Index>(inv.size());
  out.interleaved = config.interleaved;
  for (Index p = 0; p < length; ++p)
    for (const auto frequency : inv) {
      const auto angle = static_cast<float>(p) * frequency;
      out.cos.push_back(static_cast<float>(std::cos(static_cast<double>(angle)) * config.concentration));
      out.sin.push_back(static_cast<float>(std::sin(static_cast<double>(angle)) * config.concentration));
    }
  return out;
}

void apply_rope(const Context& on, const RopeTable& table, float* first, Index rows, Index row_stride, Index heads, Index head_stride, Index length) {
  if (table.half == 0) return;
  const bool bf16 = rounds_to_bf16(on.compute);
  const auto half = table.half;
  // The table as torch holds it: in bf16 its numbers are rounded.
  auto c = table.cos, s = table.sin;
  round_values(on, c);
  round_values(on, s);
  parallel_ranges(on, rows, 16, [&](Index lo, Index hi) {
    for (Index r = lo; r < hi; ++r) {
      const auto at = static_cast<std::size_t>(r % length * half);
      for (Index h = 0; h < heads; ++h) turn(first + r * row_stride + h * head_stride, c.data() + at, s.data() + at, half, table.interleaved, bf16);
    }
  });
}

}  // namespace lm::cpu
