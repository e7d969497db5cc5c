// Read-ahead against a budget; every weight is looked at once, while it is warm.
#include "lm/weights.h"

#include "libshard/error.h"
#include "libshard/stop.h"
#include "lm/message.h"

#include <algorithm>
#include <chrono>
#include <cmath>

namespace lm {
namespace {

using shard::Code;
using shard::DType;

}  // namespace

WeightSource::WeightSource(const shard::Reader& from, const shard::Kernels& kernels, Compute compute)
    : dict_(from.describe()), kernels_(kernels), compute_(compute), source_(from, kernels) {
  for (const auto& [key, tensor] : dict_.tensors)
    for (const auto& shard : tensor.shards) source_.touch(shard.place.stream, key);
  if (compute_ != Compute::Fp8) return;
  for (const auto& [key, tensor] : dict_.tensors)
    if (is_block_scaled(key) && tensor.natural.size() == 2) scale_shapes_[scales_of(key)] = {blocks_of(tensor.natural[0]), blocks_of(tensor.natural[1])};
}

bool WeightSource::has(const std::string& name) const { return dict_.tensors.contains(name) || dict_.ties.contains(name) || scale_shapes_.contains(name); }

const shard::Shape& WeightSource::shape(const std::string& name) const {
  if (const auto scales = scale_shapes_.find(name); scales != scale_shapes_.end()) return scales->second;
  shard::require(has(name), Code::Mismatch, [&] { return fmt::format("{}: is missing; the model's configuration calls for it", name); });
  return dict_.at(name).natural;
}

Sides WeightSource::sides(const std::string& name) const {
  const auto& natural = shape(name);
  const auto rows = natural.size() < 2 ? 1 : natural[0];
  return {rows, rows ? shard::volume(natural) / rows : 0};
}

shard::DType WeightSource::dtype(const std::string& name) const {
  shape(name);  // refuses a name that is not there
  return dict_.at(name).dtype;
}

WeightSource::Rows WeightSource::rows_of(const std::string& name, Index lo, Index count) const {
  const auto [rows, columns] = sides(name);
  if (count < 0) count = rows - lo;
  shard::require(lo >= 0 && lo + count <= rows, Code::Mismatch, [&, rows = rows] { return fmt::format("{}: has {} rows; row {} is asked for", name, rows, lo + count - 1); });
  auto type = dict_.at(name).dtype == DType::BF16 ? DType::BF16 : DType::F32;
  if (rounds_to_bf16(compute_) && !name.ends_with("expert_bias")) type = DType::BF16;
  if (scaled(name)) type = DType::F8E4M3;
  return {dict_.at(name), lo, count, columns, type};
}

shard::DType WeightSource::type_of(const std::string& name) const { return scale_shapes_.contains(name) ? DType::F32 : rows_of(name, 0, -1).type; }

std::uint64_t WeightSource::bytes_of(const std::string& name, Index lo, Index count) const {
  if (const auto scales = scale_shapes_.find(name); scales != scale_shapes_.end()) return static_cast<std::uint64_t>(shard::volume(scales->second)) * sizeof(float);
  const auto rows = rows_of(name, lo, count);
  return static_cast<std::uint64_t>(rows.count * rows.columns) * size_of(rows.type);
}

std::shared_ptr<const MappedFile> WeightSource::mapped(std::uint32_t stream) {
  const auto file = dict_.streams[stream].file;
  const std::lock_guard lock(mutex_);
  const auto [known, fresh] = mapped_.try_emplace(file);
  if (fresh)
    if (const auto range = source_.reader().file_range(stream)) known->second = MappedFile::map(*range);
  return known->second;
}

std::optional<WeightSource::View> WeightSource::view(const std::string& name, Index lo, Index count) {
  if (scale_shapes_.contains(name) || scaled(name)) return std::nullopt;
  const auto [tensor, first, rows, columns, type] = rows_of(name, lo, count);
  if (type != tensor.dtype || rows * columns == 0) return std::nullopt;
  const auto run = shard::RangeReader(source_, tensor).dense(first * columns, (first + rows) * columns);
  if (!run) return std::nullopt;
  const auto range = source_.reader().file_range(run->stream);
  const auto file = range ? mapped(run->stream) : nullptr;
  const auto begin = range ? range->offset + run->offset : 0;
  if (!file || begin % size_of(type) || run->bytes > file->bytes().size() || begin > file->bytes().size() - run->bytes) return std::nullopt;
  const auto bytes = file->bytes().subspan(begin, run->bytes);
  constexpr std::size_t kWorthACall = 1 << 20;
  std::shared_ptr<const std::byte> owner(bytes.data(), [file, bytes](const std::byte*) {
    if (bytes.size() >= kWorthACall) MappedFile::forget(bytes);
  });
  viewed_ += run->bytes;
  return View{{std::move(owner), bytes.data(), type, rows, columns, columns, first}, bytes, *run};
}

Weight WeightSource::read_scaled(const std::string& name) {
  const auto [tensor, first, rows, columns, type] = rows_of(name, 0, -1);
  const auto across = blocks_of(columns);
  const auto numbers = take_buffer(static_cast<std::size_t>(rows * columns)), factors = take_buffer(static_cast<std::size_t>(blocks_of(rows) * across) * sizeof(float));
  auto* const scales = reinterpret_cast<float*>(factors.get());
  shard::require(shard::castable(tensor.dtype, DType::F32), Code::BadFormat,
                 [&, &tensor = tensor] { return fmt::format("{}: holds {}; a forward pass takes floating point", name, shard::name(tensor.dtype)); });
  const shard::RangeReader reader(source_, tensor);
  // Rows of a stored matrix, all of them or some (q of a fused q, k and v).
  const auto run = reader.dense(0, rows * columns);
  const auto* stored = run ? source_.reader().scaled_matrix(run->stream) : nullptr;
  if (stored) {
    const auto first_row = static_cast<Index>(run->offset / (static_cast<std::uint64_t>(columns) * size_of(tensor.dtype)));
    if (stored->columns == columns && stored->block_rows == kScaleBlock && stored->block_columns == kScaleBlock && first_row % kScaleBlock == 0) {
      const auto as_stored = stored->scales();
      std::copy_n(as_stored.begin() + first_row / kScaleBlock * across, blocks_of(rows) * across, scales);
      stored->numbers(static_cast<std::uint64_t>(first_row * columns), {numbers.get(), static_cast<std::size_t>(rows * columns)});
    } else {
      stored = nullptr;
      const std::lock_guard lock(mutex_);
      if (std::find(rescaled_.begin(), rescaled_.end(), name) == rescaled_.end()) rescaled_.push_back(name);
    }
  }
  // A block row at a time, looked at as it is stored.
  const auto most = static_cast<std::size_t>(std::min(rows, kScaleBlock) * columns);
  const auto raw = take_buffer(most * size_of(tensor.dtype)), wide = take_buffer(most * sizeof(float));
  auto* const values = reinterpret_cast<float*>(wide.get());
  shard::Buffers work;
  for (Index lo = 0; lo < rows; lo += kScaleBlock) {
    const auto some = std::min(kScaleBlock, rows - lo);
    const auto count = static_cast<std::size_t>(some * columns);
    reader.read(lo * columns, (lo + some) * columns, {raw.get(), count * size_of(tensor.dtype)}, work);
    kernels_.cast({raw.get(), count * size_of(tensor.dtype)}, tensor.dtype, {wide.get(), count * sizeof(float)}, DType::F32);
    note(name, lo, {wide, wide.get(), DType::F32, some, columns, columns}, look({wide.get(), count * sizeof(float)}, DType::F32, 1));
    if (stored) continue;
    auto* const to = numbers.get() + lo * columns;
    auto* const factor = scales + lo / kScaleBlock * across;
    if (tensor.dtype == DType::F8E4M3) std::copy_n(raw.get(), count, to), std::fill_n(factor, across, 1.0f);
    else quantise_block_row(values, some, columns, to, factor);
  }
  const std::lock_guard lock(mutex_);
  scales_[scales_of(name)] = {factors, factors.get(), DType::F32, blocks_of(rows), across, across};
  return {numbers, numbers.get(), type, rows, columns, columns};
}

Weight WeightSource::read_scales(const std::string& name) {
  for (;; read_scaled(std::string(weight_of_scales(name)))) {
    const std::lock_guard lock(mutex_);
    if (const auto known = scales_.find(name); known != scales_.end()) return known->second;
  }
}

Weight WeightSource::read(const std::string& name, Index lo, Index rows) {
  if (const auto whole = scale_shapes_.contains(name); whole || scaled(name)) {
    shard::require(lo == 0 && rows < 0, Code::Mismatch, [&] { return fmt::format("{}: is taken whole", name); });
    return whole ? read_scales(name) : read_scaled(name);
  }
  if (auto seen = view(name, lo, rows)) return seen->weight;
  const auto [tensor, first, count, columns, type] = rows_of(name, lo, rows);
  const auto elements = static_cast<std::size_t>(count * columns);
  const auto stored = take_buffer(elements * size_of(tensor.dtype));
  shard::Buffers work;
  shard::RangeReader(source_, tensor).read(first * columns, (first + count) * columns, {stored.get(), elements * size_of(tensor.dtype)}, work);
  auto data = stored;
  if (type != tensor.dtype) {
    shard::require(shard::castable(tensor.dtype, type), Code::BadFormat, [&] { return fmt::format("{}: holds {}; a forward pass takes floating point", name, shard::name(tensor.dtype)); });
    data = take_buffer(elements * size_of(type));
    kernels_.cast({stored.get(), elements * size_of(tensor.dtype)}, tensor.dtype, {data.get(), elements * size_of(type)}, type);
  }
  return {data, data.get(), type, count, columns, columns, first};
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
  if (scale_shapes_.contains(name) || scaled(name)) return;  // read() looked
  note(name, lo, weight, look({weight.data, static_cast<std::size_t>(weight.rows * weight.columns) * size_of(weight.dtype)}, weight.dtype, 1));
}

void WeightSource::check(const std::string& name, Index lo, const View& view, unsigned threads) {
  note(name, lo, view.weight, look(view.bytes, view.weight.dtype, threads, [&](std::span<const std::byte> piece) {
    if (source_.summed(view.run.stream)) source_.add_sum(view.run.stream, view.run.offset + static_cast<std::uint64_t>(piece.data() - view.bytes.data()), piece);
  }));
}

void WeightSource::note(const std::string& name, Index lo, const Weight& weight, const Sight& sight) {
  const auto count = static_cast<std::uint64_t>(weight.rows * weight.columns);
  if (count == 0) return;
  const auto bad = sight.nonfinite ? shard::count_nonfinite({weight.data, count * size_of(weight.dtype)}, weight.dtype) : shard::NonFinite{};
  const std::lock_guard lock(mutex_);
  // Several ranks may bring the same rows.
  seen_[name].try_emplace(lo, Seen{count, bad.nan + bad.inf, static_cast<std::uint64_t>(lo * weight.columns) + bad.first, sight.squares, weight.at(0, 0), sight.max_abs, sight.constant});
}

bool WeightSource::is_matrix(const std::string& name) const { return sides(name).columns > 1 && dict_.at(name).natural.size() > 1; }

void WeightSource::refuse_torn() const {
  const std::lock_guard lock(mutex_);
  for (const auto& [file, mapping] : mapped_)
    shard::require(!mapping || !mapping->torn(), Code::Io, [&] { return fmt::format("{}: became shorter while it was read", dict_.files[file]); });
}

std::vector<shard::Finding> WeightSource::findings(const shard::Budget& budget) {
  refuse_torn();
  std::vector<shard::Finding> out;
  source_.finish(budget, out);
  using Severity = shard::Finding::Severity;
  for (const auto& [name, rows] : seen_) {
    std::uint64_t nonfinite = 0, first = 0, elements = 0;
    bool constant = true;
    const auto value = rows.begin()->second.value;
    for (const auto& [lo, seen] : rows) {
      if (seen.nonfinite && !nonfinite) first = seen.first;
      nonfinite += seen.nonfinite;
      elements += seen.elements;
      constant = constant && seen.constant && seen.value == value;
    }
    if (nonfinite)
      out.push_back({"nonfinite", Severity::Error, name,
                     fmt::format("{} of {} numbers are NaN or infinite, first at {}", nonfinite, elements, shard::to_string(shard::unravel(static_cast<Index>(first), dict_.at(name).natural)))});
    else if (constant && is_matrix(name) && elements > 1)
      out.push_back({"constant", Severity::Warning, name, fmt::format("all {} numbers are {}; no trained matrix is like that", elements, value)});
  }
  if (!rescaled_.empty())
    out.push_back({"scales", Severity::Note, *std::min_element(rescaled_.begin(), rescaled_.end()),
                   fmt::format("{} weights lie in fp8 blocks that are not {} × {} from their first row on; products in fp8 take them with scales found anew", rescaled_.size(), kScaleBlock, kScaleBlock)});
  return out;
}

std::vector<WeightStats> WeightSource::stats() const {
  std::vector<WeightStats> out;
  const std::lock_guard lock(mutex_);
  for (const auto& [name, rows] : seen_) {
    double sum = 0;
    std::uint64_t count = 0;
    float most = 0;
    for (const auto& [lo, seen] : rows) sum += seen.squares, count += seen.elements, most = std::max(most, seen.max_abs);
    out.push_back({name, count, count ? std::sqrt(sum / static_cast<double>(count)) : 0, static_cast<double>(most), is_matrix(name)});
  }
  return out;
}

std::string WeightSource::tell() const {
  refuse_torn();
  std::map<std::uint32_t, std::vector<std::array<std::uint64_t, 3>>> sums;
  for (std::uint32_t s = 0; s < dict_.streams.size(); ++s)
    if (source_.summed(s)) sums[s] = source_.sums(s);
  const std::lock_guard lock(mutex_);
  MessageWriter out;
  out(seen_, sums, rescaled_);
  return out.text();
}

void WeightSource::hear(std::string_view text) {
  std::map<std::string, std::map<Index, Seen>> seen;
  std::map<std::uint32_t, std::vector<std::array<std::uint64_t, 3>>> sums;
  MessageReader in(text);
  std::vector<std::string> rescaled;
  in(seen, sums, rescaled);
  for (const auto& [stream, pieces] : sums)
    for (const auto& [offset, length, crc] : pieces)
      if (stream < dict_.streams.size()) source_.add_sum(stream, offset, length, static_cast<std::uint32_t>(crc));
  const std::lock_guard lock(mutex_);
  for (auto& [name, rows] : seen)
    if (has(name)) seen_[name].merge(rows);
  rescaled_.insert(rescaled_.end(), rescaled.begin(), rescaled.end());
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

WeightStream::WeightStream(WeightSource& source, std::vector<WeightUse> plan, std::uint64_t budget, const std::atomic<bool>* stop, unsigned threads)
    : source_(source), budget_(budget), stop_(stop), threads_(threads) {
  for (auto& use : plan) {
    index_[{use.name, use.lo}] = entries_.size();
    entries_.push_back({use, {}, {}, Entry::State::Coming, use.times});
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
      shard::refuse_stopped(stop_);
      auto view = source_.view(use.name, use.lo, use.count);
      auto weight = view ? view->weight : source_.read(use.name, use.lo, use.count);
      // The budget is given back when the last holder lets go.
      weight.owner = std::shared_ptr<const std::byte>(weight.data, [inner = weight.owner, held = held_, bytes](const std::byte*) mutable {
        inner.reset();
        const std::lock_guard lock(held->mutex);
        held->bytes -= bytes;
        held->changed.notify_all();
      });
      if (view) {
        MappedFile::bring(view->bytes);
        view->weight = weight;
      } else {
        source_.check(use.name, use.lo, weight);
      }
      // In a block of its own: a weight let go takes the same lock.
      {
        const std::lock_guard lock(held_->mutex);
        if (view) entries_[i].unseen = std::move(view);
        entries_[i].state = entries_[i].unseen ? Entry::State::Unseen : Entry::State::Ready;
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

/// Weights that lie in files are looked at by whoever comes first, on threads that are there to compute: a third one would take
/// turns with them. It also brings the weight near.
void WeightStream::see(std::unique_lock<std::mutex>& lock, Entry& entry) {
  if (entry.state == Entry::State::Unseen) {
    entry.state = Entry::State::BeingSeen;
    const auto view = std::move(*entry.unseen);
    entry.unseen.reset();
    lock.unlock();
    try {
      source_.check(entry.use.name, entry.use.lo, view, threads_);
    } catch (...) {
      lock.lock();
      error_ = std::current_exception();
      held_->changed.notify_all();
      lock.unlock();
      throw;
    }
    lock.lock();
    entry.state = Entry::State::Ready;
    held_->changed.notify_all();
    lock.unlock();  // the last holder of a weight takes the lock
  } else {
    held_->changed.wait(lock, [&] { return entry.state == Entry::State::Ready || error_; });
    if (entry.state != Entry::State::Ready) std::rethrow_exception(error_);
    lock.unlock();
  }
}

Weight WeightStream::take(const std::string& name, Index lo) {
  const auto found = index_.find({name, lo});
  shard::require(found != index_.end(), Code::Mismatch, [&] { return fmt::format("{}: is missing; the model's configuration calls for it", name); });
  auto& entry = entries_[found->second];
  await(found->second);
  Weight out;
  const std::lock_guard lock(held_->mutex);
  shard::require(entry.state == Entry::State::Ready && entry.left > 0, Code::Io, [&] { return fmt::format("{}: was let go before its last use", name); });
  out = entry.weight;
  if (--entry.left == 0) entry.weight = {};  // `out` still holds it
  return out;
}

void WeightStream::await(std::size_t number) {
  const auto start = std::chrono::steady_clock::now();
  bring(number);
  waited_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void WeightStream::bring(std::size_t number) {
  auto& entry = entries_[number];
  std::unique_lock lock(held_->mutex);
  wanted_ = std::max(wanted_, number + 1);
  held_->changed.notify_all();
  held_->changed.wait(lock, [&] { return entry.state != Entry::State::Coming || error_ || quit_; });
  // A small model is read ahead whole: whoever computes has to look as well.
  shard::refuse_stopped(stop_);
  if (error_ && entry.state != Entry::State::Ready) std::rethrow_exception(error_);
  if (entry.state != Entry::State::Ready) see(lock, entry);
}

void WeightStream::drain() {
  for (std::size_t i = 0; i < entries_.size(); ++i) await(i);
}

}  // namespace lm
