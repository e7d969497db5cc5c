// Rows and pieces of rows from one place to another.
#pragma once

#include "gpu/runtime.h"
#include "gpu/view.h"

#include <span>

namespace gpu {

/// out[t] = table[ids[t] − lo]·multiplier, zeros where the table (rows lo … lo + table.rows − 1 of a whole) does not hold it.
/// ids on the device.
void gather(StreamView on, const View& out, const View& table, std::int64_t lo, const std::int64_t* ids, double multiplier = 1);

/// out[i] = x[rows[i]]·weights[i]; `weights` may be none. Row numbers on the device, each known to be one of x's.
void gather_rows(StreamView on, const View& out, const View& x, const std::int32_t* rows, const float* weights = nullptr);

/// `from.columns` lanes of every row and each of `heads`: to[r, h·to_step + c] = from[r, h·from_step + c]. A from_step of 0 gives all
/// heads the same.
struct Piece {
  View from, to;
  std::int64_t heads = 1, from_step = 0, to_step = 0;
};
/// At most four pieces of one type in one launch.
void copy_pieces(StreamView on, std::span<const Piece> pieces);

/// What a step reads, from pinned memory of the host: to = from (f32) in to's type, both without gaps; and `count` numbers each.
struct RowNumbers {
  const std::int64_t* from;
  std::int64_t* to;
  std::int64_t count;
};
void take_inputs(StreamView on, const View& to, const View& from, const RowNumbers& ids, const RowNumbers& positions);

}  // namespace gpu
