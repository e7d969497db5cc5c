// How large a tensor's numbers are, and a digest of their bits that parts can be added up to.
#include "lm/cpu/numbers.h"
#include "lm/cpu/ops.h"
#include "lm/digest.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <vector>

namespace lm::cpu {
namespace {

constexpr auto kFactors = [] {
  std::array<std::uint64_t, kDigestGroup> out{};
  for (int j = 0; j < kDigestGroup; ++j) out[static_cast<std::size_t>(j)] = digest_factor(j);
  return out;
}();

struct Row {
  double squares = 0;
  float max_abs = 0;
  std::uint64_t nonfinite = 0, digest = 0;
};

/// A row whose first group of the digest is number `group`.
SHARD_CLONES Row look_at(const float* x, Index n, std::uint64_t group) {
  Row out;
  const auto add_group = [&](Index first, Index count) {
    std::uint64_t sum = 0;
    for (Index j = 0; j < count; ++j) sum += std::bit_cast<std::uint32_t>(x[first + j]) * kFactors[static_cast<std::size_t>(j)];
    out.digest += group_digest(sum, group++);
  };
  const auto even = n / kDigestGroup * kDigestGroup;
  for (Index i = 0; i < even; i += kDigestGroup) add_group(i, kDigestGroup);
  if (even < n) add_group(even, n - even);
  for (Index i = 0; i < n; ++i) {
    const auto size = std::abs(x[i]);
    const bool finite = size <= std::numeric_limits<float>::max();
    out.nonfinite += !finite;
    out.max_abs = finite && size > out.max_abs ? size : out.max_abs;
  }
  double lanes[8] = {};
  const auto square = [&](Index i) { return std::abs(x[i]) <= std::numeric_limits<float>::max() ? static_cast<double>(x[i]) * static_cast<double>(x[i]) : 0.0; };
  Index i = 0;
  for (; i + 8 <= n; i += 8)
    for (int l = 0; l < 8; ++l) lanes[l] += square(i + l);
  for (; i < n; ++i) lanes[0] += square(i);
  for (const double lane : lanes) out.squares += lane;
  return out;
}

}  // namespace

TensorStats stats(const Context& on, const Tensor& x) {
  std::vector<Row> rows(static_cast<std::size_t>(x.rows()));
  const auto groups = (x.columns() + kDigestGroup - 1) / kDigestGroup;
  parallel_ranges(on, x.rows(), 16, [&](Index lo, Index hi) {
    for (Index r = lo; r < hi; ++r) rows[static_cast<std::size_t>(r)] = look_at(x.row(r), x.columns(), static_cast<std::uint64_t>(r * groups));
  });
  TensorStats out;
  double squares = 0;
  for (const auto& row : rows) {  // in order: the same sum for every number of threads
    squares += row.squares;
    out.max_abs = std::max(out.max_abs, static_cast<double>(row.max_abs));
    out.nonfinite += row.nonfinite;
    out.digest += row.digest;
  }
  out.rms = std::sqrt(squares / std::max(1.0, static_cast<double>(x.rows() * x.columns())));
  return out;
}

}  // namespace lm::cpu
