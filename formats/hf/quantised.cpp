// Which stored tensors are pairs, and what they stand for. Pairs are told by their names, types and shapes.
#include "formats/hf/quantised.h"

#include "formats/hf/computed.h"
#include "libshard/error.h"
#include "libshard/numeric.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>

namespace formats::hf {
namespace {

using shard::DType;
using shard::Finding;
using shard::Index;

constexpr std::string_view kWeight = ".weight", kScaleInv = ".weight_scale_inv", kBlocks = "_blocks", kScales = "_scales";
constexpr Index kGroup = 32, kGroupBytes = 16;
constexpr std::array<float, 16> kFp4{0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.f, -.5f, -1, -1.5f, -2, -3, -4, -6};

Index blocks(Index size, Index block) { return (size - 1) / block + 1; }

class Fp8 final : public ComputedElements, public shard::ScaledMatrix {
 public:
  Fp8(const Checkpoint& checkpoint, const QuantisedPair& pair, DType dtype)
      : Fp8(checkpoint, checkpoint.stored.at(pair.weight), checkpoint.stored.at(pair.scale), pair, dtype) {}
  const shard::ScaledMatrix* scaled_matrix() const override { return this; }
  void numbers(std::uint64_t first, std::span<std::byte> into) const override { weight_.read(first, into); }
  std::vector<float> scales() const override { return scales(0, blocks(rows, block_rows)); }

 protected:
  void compute(std::uint64_t first, std::span<float> out) const override {
    std::vector<std::byte> numbers(out.size());
    weight_.read(first, numbers);
    const auto width = static_cast<std::uint64_t>(columns), height = static_cast<std::uint64_t>(block_rows);
    const auto begin = first / width / height, end = (first + out.size() - 1) / width / height + 1;
    dequantise_fp8(numbers, scales(static_cast<Index>(begin), static_cast<Index>(end)), first, width, height, static_cast<std::uint64_t>(block_columns), out);
  }

 private:
  Fp8(const Checkpoint& checkpoint, const shard::ShardedTensor& weight, const shard::ShardedTensor& scale, const QuantisedPair& pair, DType dtype)
      : ComputedElements(dtype, static_cast<std::uint64_t>(shard::volume(weight.global_shape))), weight_(bytes_of(checkpoint, weight)),
        scale_(bytes_of(checkpoint, scale)), scale_type_(scale.dtype) {
    rows = weight.global_shape[0], columns = weight.global_shape[1];
    block_rows = pair.block_rows, block_columns = pair.block_columns;
  }

  /// Of block rows [begin, end).
  std::vector<float> scales(Index begin, Index end) const {
    const auto per_row = static_cast<std::uint64_t>(blocks(columns, block_columns)), count = static_cast<std::uint64_t>(end - begin) * per_row, item = size_of(scale_type_);
    std::vector<std::byte> raw(count * item);
    scale_.read(static_cast<std::uint64_t>(begin) * per_row * item, raw);
    std::vector<float> out(count);
    shard::cast(raw, scale_type_, std::as_writable_bytes(std::span(out)), DType::F32);
    return out;
  }

  StoredBytes weight_, scale_;
  DType scale_type_;
};

class Mxfp4 final : public ComputedElements {
 public:
  Mxfp4(const Checkpoint& checkpoint, const shard::ShardedTensor& blocks, const shard::ShardedTensor& scales, DType dtype)
      : ComputedElements(dtype, static_cast<std::uint64_t>(shard::volume(scales.global_shape)) * kGroup), blocks_(bytes_of(checkpoint, blocks)), scales_(bytes_of(checkpoint, scales)) {}

 protected:
  void compute(std::uint64_t first, std::span<float> out) const override {
    const auto begin = first / kGroup, end = (first + out.size() - 1) / kGroup + 1, groups = end - begin;
    std::vector<std::byte> bytes(groups * (kGroupBytes + 1));
    const auto numbers = std::span(bytes).first(groups * kGroupBytes), scales = std::span(bytes).subspan(groups * kGroupBytes);
    blocks_.read(begin * kGroupBytes, numbers);
    scales_.read(begin, scales);
    if (groups * kGroup == out.size()) return dequantise_mxfp4(numbers, scales, out);
    std::vector<float> all(groups * kGroup);
    dequantise_mxfp4(numbers, scales, all);
    std::copy_n(all.begin() + static_cast<std::ptrdiff_t>(first % kGroup), out.size(), out.begin());
  }

 private:
  StoredBytes blocks_, scales_;
};

/// Stands for a weight that nobody asked to dequantise.
class Unread final : public ComputedElements {
 public:
  using ComputedElements::ComputedElements;

 protected:
  void compute(std::uint64_t, std::span<float>) const override { shard::fail(shard::Code::BadFormat, "a quantised weight is needed as numbers; --dtype dequantises it"); }
};

std::shared_ptr<const ComputedElements> elements(const Checkpoint& checkpoint, const QuantisedPair& pair, std::optional<DType> dtype, std::uint64_t count) {
  if (!dtype) return std::make_shared<const Unread>(DType::BF16, count);
  if (pair.kind == QuantisedPair::Kind::Fp8) return std::make_shared<const Fp8>(checkpoint, pair, *dtype);
  return std::make_shared<const Mxfp4>(checkpoint, checkpoint.stored.at(pair.weight), checkpoint.stored.at(pair.scale), *dtype);
}

/// weight_block_size of config.json; 128 × 128 where it is left out.
std::pair<Index, Index> block_size(const nlohmann::ordered_json& config) {
  const auto found = config.find("quantization_config");
  if (found == config.end() || !found->is_object() || !found->contains("weight_block_size") || (*found)["weight_block_size"].is_null()) return {128, 128};
  const auto& size = (*found)["weight_block_size"];
  const auto good = [](const auto& value) { return value.is_number_unsigned() && value.template get<std::uint64_t>() >= 1 && value.template get<std::uint64_t>() <= (1u << 30); };
  shard::require(size.is_array() && size.size() == 2 && good(size[0]) && good(size[1]), shard::Code::BadFormat,
                 [] { return "config.json: quantization_config.weight_block_size is not two positive numbers"; });
  return {size[0].get<Index>(), size[1].get<Index>()};
}

class Pairs {
 public:
  Pairs(const shard::ShardedStateDict& stored, const nlohmann::ordered_json& config, std::vector<Finding>& findings) : stored_(stored), config_(config), findings_(findings) {}

  std::vector<QuantisedPair> find() {
    const auto quantised = config_.find("quantization_config");
    bool fp8 = quantised != config_.end() && quantised->is_object();
    for (const auto& [key, tensor] : stored_.tensors) fp8 |= key.ends_with(kScaleInv);
    for (const auto& [key, tensor] : stored_.tensors) {
      if (key.ends_with(kScaleInv)) scale_inv(tensor);
      else if (key.ends_with(kBlocks) && tensor.dtype == DType::U8) mxfp4(tensor);
      else if (key.ends_with(kScales) && tensor.dtype == DType::U8) partner(tensor, key.substr(0, key.size() - kScales.size()) + std::string(kBlocks), "its blocks");
      else if (fp8 && key.ends_with(kWeight) && tensor.dtype == DType::F8E4M3) partner(tensor, key + "_scale_inv", "its scale");
    }
    return std::move(out_);
  }

 private:
  void error(const char* rule, const std::string& key, std::string message) { findings_.push_back({rule, Finding::Severity::Error, key, std::move(message)}); }

  const shard::ShardedTensor* partner(const shard::ShardedTensor& tensor, const std::string& key, const char* what) {
    const auto found = stored_.tensors.find(key);
    if (found != stored_.tensors.end()) return &found->second;
    error("missing", key, fmt::format("{} is here, {} is not", tensor.key, what));
    return nullptr;
  }

  void scale_inv(const shard::ShardedTensor& scale) {
    const auto base = scale.key.substr(0, scale.key.size() - kScaleInv.size());
    const auto* weight = partner(scale, base + std::string(kWeight), "its weight");
    if (!weight) return;
    if (weight->dtype != DType::F8E4M3) return error("dtype", weight->key, fmt::format("is {}, and has a scale; f8_e4m3 has one", name(weight->dtype)));
    if (scale.dtype != DType::F32 && scale.dtype != DType::BF16 && scale.dtype != DType::F16)
      return error("dtype", scale.key, fmt::format("is {}; scales are f32", name(scale.dtype)));
    const auto& shape = weight->global_shape;
    if (shape.size() != 2 || shape[0] < 1 || shape[1] < 1) return error("shape", weight->key, fmt::format("shape is {}; a weight in scaled blocks has rows and columns", shard::to_string(shape)));
    const auto [rows, columns] = block_size(config_);
    if (const shard::Shape should{blocks(shape[0], rows), blocks(shape[1], columns)}; scale.global_shape != should)
      return error("shape", scale.key, fmt::format("shape is {}; blocks of {} × {} in {} need {}", shard::to_string(scale.global_shape), rows, columns, shard::to_string(shape), shard::to_string(should)));
    out_.push_back({QuantisedPair::Kind::Fp8, weight->key, scale.key, weight->key, rows, columns});
  }

  void mxfp4(const shard::ShardedTensor& blocks) {
    const auto base = blocks.key.substr(0, blocks.key.size() - kBlocks.size());
    const auto* scales = partner(blocks, base + std::string(kScales), "its scale");
    if (!scales) return;
    if (scales->dtype != DType::U8) return error("dtype", scales->key, fmt::format("is {}; scales of MXFP4 are u8", name(scales->dtype)));
    const auto& shape = blocks.global_shape;
    if (shape.size() != 4 || shape[3] != kGroupBytes || std::any_of(shape.begin(), shape.end(), [](Index size) { return size < 1; }))
      return error("shape", blocks.key, fmt::format("shape is {}; MXFP4 blocks are [experts, rows, groups, 16]", shard::to_string(shape)));
    if (const shard::Shape should{shape[0], shape[1], shape[2]}; scales->global_shape != should)
      return error("shape", scales->key, fmt::format("shape is {}; its blocks need {}", shard::to_string(scales->global_shape), shard::to_string(should)));
    if (stored_.tensors.contains(base)) return error("unexpected", base, fmt::format("stands beside {}, which is the same weight", blocks.key));
    out_.push_back({QuantisedPair::Kind::Mxfp4, blocks.key, scales->key, base});
  }

  const shard::ShardedStateDict& stored_;
  const nlohmann::ordered_json& config_;
  std::vector<Finding>& findings_;
  std::vector<QuantisedPair> out_;
};

}  // namespace

std::vector<QuantisedPair> quantised_pairs(const shard::ShardedStateDict& stored, const nlohmann::ordered_json& config, std::vector<Finding>& findings) {
  return Pairs(stored, config, findings).find();
}

shard::ShardedStateDict dequantised(const Checkpoint& checkpoint, const std::vector<QuantisedPair>& pairs, std::optional<DType> dtype, std::uint32_t& first) {
  auto out = checkpoint.stored;
  first = static_cast<std::uint32_t>(out.streams.size());
  for (const auto& pair : pairs) {
    const auto& weight = checkpoint.stored.at(pair.weight);
    const auto file = checkpoint.stored.files[checkpoint.stored.streams[weight.shards.at(0).place.stream].file];
    out.tensors.erase(pair.weight);
    out.tensors.erase(pair.scale);
    auto shape = weight.global_shape, stride = shard::row_major(shape);
    if (pair.kind == QuantisedPair::Kind::Mxfp4) {
      // Rows are output channels; the unquantised tensor holds them as columns. Strides say so, nothing is moved.
      const auto rows = shape[1], columns = shape[2] * kGroup;
      shape = {shape[0], columns, rows};
      stride = {rows * columns, 1, columns};
    }
    auto computed = elements(checkpoint, pair, dtype, static_cast<std::uint64_t>(shard::volume(shape)));
    place(checkpoint, out, {pair.key, dtype.value_or(DType::BF16), shape, shape, {}, false}, std::move(computed), file, stride);
  }
  return out;
}

std::vector<Finding> scale_findings(const Checkpoint& checkpoint) {
  constexpr std::uint64_t kAtOnce = 1 << 20;
  constexpr float kLargestFp8 = 448, kLargestExponent = 252;  // 6 · 2^(252 - 127) is the last that f32 holds
  std::vector<Finding> out;
  for (const auto& key : checkpoint.quantised) {
    const bool mxfp4 = key.ends_with(kScales);
    if (!mxfp4 && !key.ends_with(kScaleInv)) continue;
    const auto& scale = checkpoint.stored.at(key);
    const auto bytes = bytes_of(checkpoint, scale);
    const auto count = static_cast<std::uint64_t>(shard::volume(scale.global_shape)), item = static_cast<std::uint64_t>(size_of(scale.dtype));
    std::uint64_t bad = 0, first = 0;
    for (std::uint64_t at = 0; at < count; at += kAtOnce) {
      std::vector<std::byte> raw(std::min(kAtOnce, count - at) * item);
      bytes.read(at * item, raw);
      std::vector<float> values(raw.size() / item);
      if (mxfp4) std::transform(raw.begin(), raw.end(), values.begin(), [](std::byte exponent) { return static_cast<float>(exponent); });
      else shard::cast(raw, scale.dtype, std::as_writable_bytes(std::span(values)), DType::F32);
      for (std::size_t i = 0; i < values.size(); ++i) {
        const bool good = mxfp4 ? values[i] <= kLargestExponent : values[i] > 0 && std::isfinite(values[i] * kLargestFp8);
        if (!good && bad++ == 0) first = at + i;
      }
    }
    const char* what = mxfp4 ? "exponents above 252 (255 is no number, the others overflow)" : "zero, negative, not finite, or overflow with the largest number";
    if (bad > 0) out.push_back({"nonfinite", Finding::Severity::Error, key, fmt::format("{} of {} scales are {}; the first is element {}", bad, count, what, first)});
  }
  return out;
}

void dequantise_fp8(std::span<const std::byte> numbers, std::span<const float> scales, std::uint64_t first, std::uint64_t columns,
                    std::uint64_t block_rows, std::uint64_t block_columns, std::span<float> out) {
  shard::cast(numbers, DType::F8E4M3, std::as_writable_bytes(out), DType::F32);
  const auto per_row = (columns - 1) / block_columns + 1, base = first / columns / block_rows;
  for (std::uint64_t at = 0; at < out.size();) {
    const auto row = (first + at) / columns, column = (first + at) % columns;
    const auto block = column / block_columns, end = std::min((block + 1) * block_columns, columns);
    const auto count = std::min<std::uint64_t>(end - column, out.size() - at);
    const auto scale = scales[(row / block_rows - base) * per_row + block];
    for (auto* value = out.data() + at, *last = value + count; value < last; ++value) *value *= scale;
    at += count;
  }
}

void dequantise_mxfp4(std::span<const std::byte> blocks, std::span<const std::byte> scales, std::span<float> out) {
  auto* to = out.data();
  const auto* from = blocks.data();
  for (const auto exponent : scales) {
    // 0 is 2^-127, a subnormal; 255 is the format's NaN.
    const auto bits = static_cast<std::uint32_t>(exponent);
    const auto scale = std::bit_cast<float>(bits == 255 ? 0x7fc00000u : bits == 0 ? 0x00400000u : bits << 23);
    std::array<float, 16> values;
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = kFp4[i] * scale;
    for (Index i = 0; i < kGroupBytes; ++i, to += 2) {
      const auto both = static_cast<unsigned>(*from++);
      to[0] = values[both & 15];
      to[1] = values[both >> 4];
    }
  }
}

}  // namespace formats::hf
