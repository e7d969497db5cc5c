// Read-ahead against a budget; every weight is looked at once, while it is warm.
#include "lm/weights.h"

#include "libshard/error.h"
#include "libshard/float_bits.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

namespace lm {
namespace {

using shard::Code;
using shard::DType;

struct Sight {
  bool nonfinite = false, constant = true;
  float max_abs = 0;
  double squares = 0;
};

// Sixteen lanes of f32 over short blocks, blocks in f64: the same sum for every instruction set.
constexpr std::uint64_t kLanes = 16, kBlock = 4096;

SHARD_INLINE double sum_of(const float (&lanes)[kLanes]) {
  double sum = 0;
  for (const auto lane : lanes) sum += static_cast<double>(lane);
  return sum;
}

SHARD_CLONES Sight look_bf16(const std::byte* data, std::uint64_t count) {
  std::uint16_t first;
  std::memcpy(&first, data, 2);
  std::uint16_t other = 0, top = 0;
  const auto* items = reinterpret_cast<const std::uint16_t*>(data);  // buffers are aligned; written as bytes only
  const auto value = [](std::uint16_t bits) { return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16); };
  double squares = 0;
  for (std::uint64_t begin = 0; begin < count; begin += kBlock) {
    const auto end = std::min(count, begin + kBlock);
    for (auto i = begin; i < end; ++i) {
      const std::uint16_t bits = items[i], magnitude = bits & 0x7fff;
      other = static_cast<std::uint16_t>(other | (bits ^ first));
      top = magnitude > top ? magnitude : top;
    }
    float lanes[kLanes] = {};
    auto i = begin;
    for (; i + kLanes <= end; i += kLanes)
      for (std::uint64_t l = 0; l < kLanes; ++l) lanes[l] += value(items[i + l]) * value(items[i + l]);
    for (; i < end; ++i) lanes[0] += value(items[i]) * value(items[i]);
    squares += sum_of(lanes);
  }
  return {top >= 0x7f80, other == 0, value(top), squares};
}
SHARD_CLONES Sight look_f32(const std::byte* data, std::uint64_t count) {
  std::uint32_t first;
  std::memcpy(&first, data, 4);
  std::uint32_t other = 0, top = 0;
  const auto* items = reinterpret_cast<const std::uint32_t*>(data);
  double squares = 0;
  for (std::uint64_t begin = 0; begin < count; begin += kBlock) {
    const auto end = std::min(count, begin + kBlock);
    for (auto i = begin; i < end; ++i) {
      const std::uint32_t bits = items[i], magnitude = bits & 0x7fffffff;
      other |= bits ^ first;
      top = magnitude > top ? magnitude : top;
    }
    float lanes[kLanes] = {};
    auto i = begin;
    for (; i + kLanes <= end; i += kLanes)
      for (std::uint64_t l = 0; l < kLanes; ++l) lanes[l] += std::bit_cast<float>(items[i + l]) * std::bit_cast<float>(items[i + l]);
    for (; i < end; ++i) lanes[0] += std::bit_cast<float>(items[i]) * std::bit_cast<float>(items[i]);
    squares += sum_of(lanes);
  }
  return {top >= 0x7f800000, other == 0, std::bit_cast<float>(top), squares};
}

}  // namespace

WeightSource::WeightSource(const shard::Reader& from, const shard::Kernels& kernels, Compute compute)
    : dict_(from.describe()), kernels_(kernels), compute_(compute), source_(from, kernels) {
  for (const auto& [key, tensor] : dict_.tensors)
    for (const auto& shard : tensor.shards) source_.touch(shard.place.stream, key);
}

bool WeightSource::has(const std::string& name) const { return dict_.tensors.contains(name) || dict_.ties.contains(name); }

const shard::Shape& WeightSource::shape(const std::string& name) const {
  shard::require(has(name), Code::Mismatch, [&] { return fmt::format("{}: is missing; the model's configuration calls for it", name); });
  return dict_.at(name).natural;
}

shard::DType WeightSource::dtype(const std::string& name) const {
  shape(name);  // refuses a name that is not there
  return dict_.at(name).dtype;
}

Weight WeightSource::read(const std::string& name, Index lo, Index count) {
  const auto& natural = shape(name);
  const auto& tensor = dict_.at(name);
  const auto all = shard::volume(natural);
  const auto rows = natural.size() < 2 ? 1 : natural[0];
  const auto columns = rows ? all / rows : 0;
  if (count < 0) count = rows - lo;
  shard::require(lo >= 0 && lo + count <= rows, Code::Mismatch, [&] { return fmt::format("{}: has {} rows; row {} is asked for", name, rows, lo + count - 1); });
  const auto elements = static_cast<std::size_t>(count * columns);
  const auto stored = take_buffer(elements * size_of(tensor.dtype));
  shard::Buffers work;
  shard::RangeReader(source_, tensor).read(lo * columns, (lo + count) * columns, {stored.get(), elements * size_of(tensor.dtype)}, work);
  auto type = tensor.dtype == DType::BF16 ? DType::BF16 : DType::F32;
  if (compute_ == Compute::Bf16 && !name.ends_with("expert_bias")) type = DType::BF16;
  auto data = stored;
  if (type != tensor.dtype) {
    shard::require(shard::castable(tensor.dtype, type), Code::BadFormat, [&] { return fmt::format("{}: holds {}; a forward pass takes floating point", name, shard::name(tensor.dtype)); });
    data = take_buffer(elements * size_of(type));
    kernels_.cast({stored.get(), elements * size_of(tensor.dtype)}, tensor.dtype, {data.get(), elements * size_of(type)}, type);
  }
  return {data, data.get(), type, count, columns, columns};
}

Tensor WeightSource::gather(const std::string& name, std::span<const Index> ids, Index lo, Index hi) {
  const auto& natural = shape(name);
  shard::require(natural.size() == 2, Code::Mismatch, [&] { return fmt::format("{}: is {}; should be a table", name, shard::to_string(natural)); });
  Tensor out(static_cast<Index>(ids.size()), natural[1]);
  std::map<Index, Index> first;
  for (std::size_t i = 0; i < ids.size(); ++i) {
    auto* to = out.row(static_cast<Index>(i));
    shard::require(ids[i] >= 0 && ids[i] < natural[0], Code::Mismatch, [&] { return fmt::format("{}: has {} rows; row {} is asked for", name, natural[0], ids[i]); });
    if (ids[i] < lo || ids[i] >= hi) {
      std::fill(to, to + natural[1], 0.0f);
      continue;
    }
    const auto [known, fresh] = first.emplace(ids[i], static_cast<Index>(i));
    if (!fresh) {
      std::copy(out.row(known->second), out.row(known->second) + natural[1], to);
      continue;
    }
    const auto row = read(name, ids[i], 1);
    for (Index c = 0; c < natural[1]; ++c) to[c] = row.at(0, c);
  }
  return out;
}

void WeightSource::check(const std::string& name, Index lo, const Weight& weight) {
  const auto count = static_cast<std::uint64_t>(weight.rows * weight.columns);
  if (count == 0) return;
  const auto sight = weight.dtype == DType::BF16 ? look_bf16(weight.data, count) : look_f32(weight.data, count);
  const auto bad = sight.nonfinite ? shard::count_nonfinite({weight.data, count * size_of(weight.dtype)}, weight.dtype) : shard::NonFinite{};
  const std::lock_guard lock(mutex_);
  auto& seen = seen_[name];
  if (sight.nonfinite && !seen.nonfinite) seen.first = seen.elements + bad.first;
  if (seen.elements == 0) seen.value = weight.at(0, 0);
  seen.constant = seen.constant && sight.constant && weight.at(0, 0) == seen.value;
  seen.matrix = seen.matrix || (weight.columns > 1 && dict_.at(name).natural.size() > 1);
  seen.max_abs = std::max(seen.max_abs, sight.max_abs);
  seen.squares[lo] = {sight.squares, count};
  seen.nonfinite += bad.nan + bad.inf;
  seen.elements += count;
}

std::vector<shard::Finding> WeightSource::findings(unsigned threads) {
  std::vector<shard::Finding> out;
  source_.finish(threads, out);
  using Severity = shard::Finding::Severity;
  for (const auto& [name, seen] : seen_) {
    if (seen.nonfinite)
      out.push_back({"nonfinite", Severity::Error, name,
                     fmt::format("{} of {} numbers are NaN or infinite, first at {}", seen.nonfinite, seen.elements,
                                 shard::to_string(shard::unravel(static_cast<Index>(seen.first), dict_.at(name).natural)))});
    else if (seen.constant && seen.matrix && seen.elements > 1)
      out.push_back({"constant", Severity::Warning, name, fmt::format("all {} numbers are {}; no trained matrix is like that", seen.elements, seen.value)});
  }
  return out;
}

std::vector<WeightStats> WeightSource::stats() const {
  std::vector<WeightStats> out;
  const std::lock_guard lock(mutex_);
  for (const auto& [name, seen] : seen_) {
    double sum = 0;
    std::uint64_t count = 0;
    for (const auto& [lo, rows] : seen.squares) sum += rows.first, count += rows.second;
    out.push_back({name, count, count ? std::sqrt(sum / static_cast<double>(count)) : 0, static_cast<double>(seen.max_abs), seen.matrix});
  }
  return out;
}

std::vector<shard::Finding> norm_outliers(const std::vector<WeightStats>& weights) {
  constexpr double kFar = 10;
  constexpr std::size_t kLeastLayers = 4;
  std::map<std::string, std::vector<const WeightStats*>> kinds;  // by name without its numbers
  for (const auto& weight : weights) {
    if (!weight.matrix || !std::isfinite(weight.rms)) continue;
    std::string kind;
    for (const char c : weight.name)
      if (c < '0' || c > '9') kind += c;
    if (kind != weight.name) kinds[kind].push_back(&weight);
  }
  std::vector<shard::Finding> out;
  for (const auto& [kind, all] : kinds) {
    if (all.size() < kLeastLayers) continue;
    std::vector<double> sizes;
    for (const auto* weight : all) sizes.push_back(weight->rms);
    const auto middle = sizes.begin() + static_cast<std::ptrdiff_t>(sizes.size() / 2);
    std::nth_element(sizes.begin(), middle, sizes.end());
    for (const auto* weight : all)
      if (*middle > 0 && (weight->rms > kFar * *middle || weight->rms * kFar < *middle))
        out.push_back({"norm", shard::Finding::Severity::Warning, weight->name,
                       fmt::format("root mean square {:.3g}; {:.3g} in the median layer", weight->rms, *middle)});
  }
  return out;
}

WeightStream::WeightStream(WeightSource& source, std::vector<WeightUse> plan, std::uint64_t budget, const std::atomic<bool>* stop)
    : source_(source), budget_(budget), stop_(stop) {
  for (auto& use : plan) {
    index_[{use.name, use.lo}] = entries_.size();
    entries_.push_back({use, {}, false, use.times});
  }
  thread_ = std::thread([this] { run(); });
}

WeightStream::~WeightStream() {
  {
    const std::lock_guard lock(held_->mutex);
    quit_ = true;
    held_->changed.notify_all();
  }
  thread_.join();
}

void WeightStream::run() {
  try {
    for (std::size_t i = 0; i < entries_.size(); ++i) {
      const auto& use = entries_[i].use;
      const auto& natural = source_.shape(use.name);
      const auto columns = natural.empty() || natural[0] == 0 ? 1 : shard::volume(natural) / natural[0];
      const auto bytes = static_cast<std::uint64_t>((use.count < 0 && !natural.empty() ? natural[0] : std::max<Index>(use.count, 1)) * columns) * 4;
      {
        std::unique_lock lock(held_->mutex);
        held_->changed.wait(lock, [&] { return quit_ || held_->bytes == 0 || held_->bytes + bytes <= budget_ || i < wanted_; });
        if (quit_) return;
        held_->bytes += bytes;
      }
      shard::require(!stop_ || !*stop_, Code::Io, [] { return "stopped by a signal"; });
      auto weight = source_.read(use.name, use.lo, use.count);
      // The budget is given back when the last holder lets go.
      const auto inner = weight.owner;
      weight.owner = std::shared_ptr<const std::byte>(weight.data, [inner = std::shared_ptr<const std::byte>(inner), held = held_, bytes](const std::byte*) mutable {
        inner.reset();
        const std::lock_guard lock(held->mutex);
        held->bytes -= bytes;
        held->changed.notify_all();
      });
      source_.check(use.name, use.lo, weight);
      // In a block of its own: a weight let go takes the same lock.
      {
        const std::lock_guard lock(held_->mutex);
        entries_[i].ready = true;
        if (use.times > 0) entries_[i].weight = weight;
        held_->changed.notify_all();
      }
    }
  } catch (...) {
    const std::lock_guard lock(held_->mutex);
    error_ = std::current_exception();
  }
  const std::lock_guard lock(held_->mutex);
  done_ = true;
  held_->changed.notify_all();
}

Weight WeightStream::take(const std::string& name, Index lo) {
  const auto found = index_.find({name, lo});
  shard::require(found != index_.end(), Code::Mismatch, [&] { return fmt::format("{}: is missing; the model's configuration calls for it", name); });
  auto& entry = entries_[found->second];
  Weight out;
  std::unique_lock lock(held_->mutex);
  wanted_ = std::max(wanted_, found->second + 1);
  held_->changed.notify_all();
  held_->changed.wait(lock, [&] { return entry.ready || error_ || quit_; });
  // A small model is read ahead whole: whoever computes has to look as well.
  shard::require(!stop_ || !*stop_, Code::Io, [] { return "stopped by a signal"; });
  if (error_ && !entry.ready) std::rethrow_exception(error_);
  shard::require(entry.ready && entry.left > 0, Code::Io, [&] { return fmt::format("{}: was let go before its last use", name); });
  out = entry.weight;
  if (--entry.left == 0) entry.weight = {};  // `out` still holds it
  return out;
}

void WeightStream::drain() {
  std::unique_lock lock(held_->mutex);
  wanted_ = entries_.size();
  held_->changed.notify_all();
  held_->changed.wait(lock, [&] { return done_; });
  if (error_) std::rethrow_exception(error_);
}

}  // namespace lm
