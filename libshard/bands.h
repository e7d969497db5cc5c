// Groups of row-wise copies that go through two files in step: each row block is read once and written once.
#pragma once

#include "libshard/plan.h"

#include <vector>

namespace shard {

/// The part of every row of one stream that a group reads or writes.
struct Band {
  std::uint32_t stream;
  std::uint64_t start;   ///< of the first row
  std::uint64_t stride;  ///< from row to row
  std::uint64_t width;   ///< bytes of each row, no more than the stride
};

struct Strip {
  std::size_t from_band, to_band;
  std::uint64_t from, to, run;  ///< within a row
};

struct Group {
  Index rows;
  std::vector<Band> from, to;
  std::vector<Strip> strips;
};

/// Groups the copies that loop once over rows; the others' indices come back in `rest`.
std::vector<Group> group_rows(const std::vector<Copy>& copies, std::vector<std::size_t>& rest);

}  // namespace shard
