// How large a tensor's numbers are, and a digest of their bits that parts can be added up to.
#include "lm/cpu/numbers.h"
#include "lm/cpu/ops.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace lm::cpu {
namespace {

struct Row {
  double squares = 0;
  float max_abs = 0;
  std::uint64_t nonfinite = 0, digest = 0;
};

/// The finaliser of splitmix64.
constexpr std::uint64_t mix(std::uint64_t z) {
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ z >> 27) * 0x94d049bb133111ebull;
  return z ^ z >> 31;
}

SHARD_CLONES Row look_at(const float* x, Index n, std::uint64_t first) {
  Row out;
  for (Index i = 0; i < n; ++i) {
    out.digest += mix(std::bit_cast<std::uint32_t>(x[i]) + (first + static_cast<std::uint64_t>(i)) * 0x9e3779b97f4a7c15ull);
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
  parallel_ranges(on, x.rows(), 16, [&](Index lo, Index hi) {
    for (Index r = lo; r < hi; ++r) rows[static_cast<std::size_t>(r)] = look_at(x.row(r), x.columns(), static_cast<std::uint64_t>(r * x.columns()));
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
