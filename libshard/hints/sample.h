// Looking at a few rows of logical tensors: which ones, and whether two places hold the same numbers.
#pragma once

#include "libshard/inspectors.h"
#include "libshard/range_reader.h"

#include <functional>
#include <memory>
#include <optional>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace shard::hints {

/// Rows are indices of the first natural dimension; a vector has rows of one element.
struct Extent {
  Index rows, width;
};
Extent extent(const ShardedTensor& tensor);

/// Logical tensors of one checkpoint, read a few elements at a time and without summing. For one thread.
class Side {
 public:
  Side(const Reader& reader, std::optional<Index> vocab, const Kernels& kernels, const Budget& budget);

  const ShardedTensor* find(std::string_view key) const;
  const ShardedStateDict& dict() const { return reader_.describe(); }
  /// Rows that count: padding of a vocabulary is left out.
  Index rows(const ShardedTensor& tensor) const;
  /// Elements from `flat` on, row-major. The bytes are good until the next call.
  std::span<const std::byte> read(const ShardedTensor& tensor, Index flat, Index count);
  /// Bytes read so far, and in how many pieces.
  std::uint64_t spent() const { return spent_; }
  std::uint64_t reads() const { return reads_; }

 private:
  struct Unsummed;
  const Reader& reader_;
  std::optional<Index> vocab_;
  const Budget& budget_;
  std::shared_ptr<const Unsummed> unsummed_;
  SummedSource source_;
  std::unordered_map<const ShardedTensor*, RangeReader> readers_;
  Buffers buffers_;
  std::uint64_t spent_ = 0, reads_ = 0;
};

/// Both sides, and how much may still be looked at.
struct Both {
  Side &a, &b;
  /// How many rows of a tensor to look at: fewer once much was read, so that many tensors stay affordable.
  Index rows_to_look_at() const;
  /// Whether a tensor's every row may still be looked for: that is for a few tensors, not for all of a model.
  bool may_search() const;
};

/// Up to `most` rows of [0, rows): `first`, its neighbours, then rows spread irregularly, so that no period of
/// heads or ranks hides between them. All rows where there are no more than `most`.
std::vector<Index> spread(Index rows, Index first, Index most);

/// Whether the bytes are the same numbers: equal bytes, or equal once the wider type is rounded to the narrower.
bool same_numbers(std::span<const std::byte> a, DType a_type, std::span<const std::byte> b, DType b_type);

/// What to look at of one of b's tensors: rows, and a window of columns.
struct Window {
  std::vector<Index> rows;
  Index column = 0, columns = 1;
};
/// The window around element `first`, where the two are known to differ.
Window window(const Both& both, const ShardedTensor& b, Index first);

/// Where a row of b should be found in a; nullopt: nowhere, the hypothesis is wrong.
struct RowOf {
  const ShardedTensor* tensor;
  Index row;
};
using RowMap = std::function<std::optional<RowOf>(Index row_of_b)>;
/// Whether every row of the window lies in a where the map says.
bool rows_match(const Both& both, const ShardedTensor& b, const Window& look, const RowMap& map);

}  // namespace shard::hints
