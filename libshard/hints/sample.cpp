// Reads are small and many; readers are kept for the tensors that were looked at last.
#include "libshard/hints/sample.h"

#include "libshard/error.h"
#include "libshard/stop.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <set>

namespace shard::hints {
namespace {

constexpr std::uint64_t kPlenty = 512ull << 20;  // bytes after which less is looked at
constexpr std::uint64_t kSearches = 4u << 20;     // reads after which nothing is searched row by row
constexpr std::size_t kReaders = 4096;
constexpr Index kColumns = 1024;

}  // namespace

/// The same bytes without recorded sums: short reads would pile up pieces of sums that nobody finishes.
struct Side::Unsummed final : Reader {
  explicit Unsummed(const Reader& from) : from_(from) {
    dict_.files = from.describe().files;
    dict_.streams = from.describe().streams;
    for (auto& stream : dict_.streams) stream.crc32.reset();
  }
  const ShardedStateDict& describe() const override { return dict_; }
  void read(std::uint32_t stream, std::uint64_t offset, std::span<std::byte> into) const override { from_.read(stream, offset, into); }
  std::optional<FileRange> file_range(std::uint32_t stream) const override { return from_.file_range(stream); }

  const Reader& from_;
  ShardedStateDict dict_;
};

Extent extent(const ShardedTensor& tensor) {
  const auto& shape = tensor.natural.empty() ? tensor.global_shape : tensor.natural;
  const auto all = volume(tensor.global_shape);
  if (shape.empty() || all == 0) return {all, 1};
  return {shape[0], all / shape[0]};
}

Side::Side(const Reader& reader, std::optional<Index> vocab, const Kernels& kernels, const Budget& budget)
    : reader_(reader), vocab_(vocab), budget_(budget), unsummed_(std::make_shared<Unsummed>(reader)), source_(*unsummed_, kernels) {}

const ShardedTensor* Side::find(std::string_view key) const {
  const auto found = dict().tensors.find(key);
  return found == dict().tensors.end() ? nullptr : &found->second;
}

Index Side::rows(const ShardedTensor& tensor) const { return tensor.vocabulary ? rows_that_count(tensor, vocab_) : extent(tensor).rows; }

std::span<const std::byte> Side::read(const ShardedTensor& tensor, Index flat, Index count) {
  refuse_stopped(budget_.stop);
  auto found = readers_.find(&tensor);
  if (found == readers_.end()) {
    if (readers_.size() >= kReaders) readers_.clear();
    found = readers_.try_emplace(&tensor, source_, tensor).first;
  }
  const auto bytes = Buffers::need(buffers_.c, static_cast<std::uint64_t>(count) * size_of(tensor.dtype));
  found->second.read(flat, flat + count, bytes, buffers_);
  spent_ += bytes.size();
  ++reads_;
  return bytes;
}

Index Both::rows_to_look_at() const { return a.spent() + b.spent() < kPlenty ? 64 : 6; }

bool Both::may_search() const { return a.reads() + b.reads() < kSearches; }

std::vector<Index> spread(Index rows, Index first, Index most) {
  std::vector<Index> out;
  if (rows <= 0) return out;
  first = std::clamp<Index>(first, 0, rows - 1);
  out.push_back(first);
  if (rows <= most) {
    for (Index i = 0; i < rows; ++i)
      if (i != first) out.push_back(i);
    return out;
  }
  std::set<Index> seen{first};
  const auto add = [&](Index row) {
    if (row >= 0 && row < rows && seen.insert(row).second) out.push_back(row);
  };
  add(first + 1);
  add(first - 1);
  constexpr double kGolden = 0.6180339887498949;
  for (Index i = 1; i <= 2 * most && static_cast<Index>(out.size()) < most; ++i) {
    const auto part = static_cast<double>(i) * kGolden;
    add(static_cast<Index>((part - std::floor(part)) * static_cast<double>(rows)));
  }
  return out;
}

bool same_numbers(std::span<const std::byte> a, DType a_type, std::span<const std::byte> b, DType b_type) {
  if (a_type == b_type) return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size()) == 0;
  if (!castable(a_type, b_type) || a.size() / size_of(a_type) != b.size() / size_of(b_type)) return false;
  const bool to_b = size_of(b_type) <= size_of(a_type);
  std::vector<std::byte> rounded(to_b ? b.size() : a.size());
  if (to_b) cast(a, a_type, rounded, b_type);
  else cast(b, b_type, rounded, a_type);
  return std::memcmp(rounded.data(), to_b ? b.data() : a.data(), rounded.size()) == 0;
}

Window window(const Both& both, const ShardedTensor& b, Index first) {
  const auto [rows, width] = extent(b);
  Window out;
  if (rows == 0 || width == 0) return out;
  out.columns = std::min(width, kColumns);
  out.column = std::clamp<Index>(first % width - out.columns / 2, 0, width - out.columns);
  // A vector's rows are single numbers, which say little each.
  out.rows = spread(both.b.rows(b), first / width, both.rows_to_look_at() * (width == 1 ? 4 : 1));
  return out;
}

bool rows_match(const Both& both, const ShardedTensor& b, const Window& look, const RowMap& map) {
  if (look.rows.empty()) return false;
  const auto width = extent(b).width;
  return std::all_of(look.rows.begin(), look.rows.end(), [&](Index row) {
    const auto from = map(row);
    if (!from || !from->tensor) return false;
    const auto [rows, from_width] = extent(*from->tensor);
    if (from_width != width || from->row < 0 || from->row >= rows) return false;
    const auto right = both.b.read(b, row * width + look.column, look.columns);
    const auto left = both.a.read(*from->tensor, from->row * width + look.column, look.columns);
    return same_numbers(left, from->tensor->dtype, right, b.dtype);
  });
}

}  // namespace shard::hints
