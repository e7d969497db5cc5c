// A few runs of both tensors as doubles; every hypothesis must hold for all of them.
#include "libshard/hints/values.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>

namespace shard::hints {
namespace {

struct Values {
  std::vector<double> a, b;
  template <typename Test>
  bool all(Test&& test) const {
    for (std::size_t i = 0; i < a.size(); ++i)
      if (!test(a[i], b[i])) return false;
    return !a.empty();
  }
};

constexpr Index kRun = 256;

Values look(const Both& both, const Subject& subject) {
  Values out;
  const auto count = std::min(volume(subject.a.global_shape), volume(subject.b.global_shape));
  const auto append = [](std::vector<double>& into, std::span<const std::byte> bytes, DType dtype) {
    for (std::size_t at = 0; at < bytes.size(); at += size_of(dtype)) into.push_back(value_at(bytes.data() + at, dtype));
  };
  const auto real = count / std::max<Index>(1, extent(subject.b).rows) * both.b.rows(subject.b);  // without padding rows
  const auto end = std::min(count, std::max<Index>(real, 1));
  for (const auto run : spread((end + kRun - 1) / kRun, subject.first / kRun, both.rows_to_look_at() / 2)) {
    const auto size = std::min(kRun, end - run * kRun);
    append(out.a, both.a.read(subject.a, run * kRun, size), subject.a.dtype);
    append(out.b, both.b.read(subject.b, run * kRun, size), subject.b.dtype);
  }
  return out;
}

/// Relative distance between neighbouring numbers of the type.
double step_of(DType dtype) {
  switch (dtype) {
    case DType::F64: return 0x1p-52;
    case DType::F32: return 0x1p-23;
    case DType::F16: return 0x1p-10;
    case DType::BF16: return 0x1p-7;
    case DType::F8E4M3: return 0x1p-3;
    case DType::F8E5M2: return 0x1p-2;
    default: return 0;
  }
}

double rounded(double value, DType dtype) {
  std::byte narrow[8];
  const std::span to(narrow, size_of(dtype));
  cast(std::as_bytes(std::span(&value, 1)), DType::F64, to, dtype);
  return value_at(narrow, dtype);
}

std::string explain_rounding(const Values& values, const Subject& subject) {
  const auto equal = [](double x, double y) { return x == y || (std::isnan(x) && std::isnan(y)); };
  if (subject.a.dtype != subject.b.dtype && values.all(equal)) return "the same values as another type";
  std::array narrow{DType::BF16, DType::F16, DType::F8E4M3, DType::F8E5M2};
  // The types at hand first: what is infinite in one may be so in another, too.
  std::stable_partition(narrow.begin(), narrow.end(), [&](DType dtype) { return dtype == subject.a.dtype || dtype == subject.b.dtype; });
  for (const auto dtype : narrow) {
    if (!castable(subject.a.dtype, dtype) || !castable(subject.b.dtype, dtype)) continue;
    const auto text = [&](const char* which, const char* of) { return fmt::format("{} holds {}'s values rounded to {}: the type lost precision", which, of, name(dtype)); };
    if (values.all([&](double x, double y) { return equal(rounded(x, dtype), y); })) return text("b", "a");
    if (values.all([&](double x, double y) { return equal(x, rounded(y, dtype)); })) return text("a", "b");
    const bool wide = size_of(subject.a.dtype) > size_of(dtype) || size_of(subject.b.dtype) > size_of(dtype);
    if (size_of(dtype) == 2 && wide && values.all([&](double x, double y) { return equal(rounded(x, dtype), rounded(y, dtype)); }))
      return fmt::format("equal once rounded to {}: the type lost precision", name(dtype));
  }
  return {};
}

std::string explain_factor(const Values& values, double step) {
  std::size_t largest = 0, counted = 0;
  for (std::size_t i = 0; i < values.a.size(); ++i) {
    if (std::abs(values.a[i]) > std::abs(values.a[largest])) largest = i;
    counted += values.a[i] != 0;
  }
  if (counted < 4 || values.a[largest] == 0 || !std::isfinite(values.a[largest])) return {};
  const auto factor = values.b[largest] / values.a[largest];
  if (!std::isfinite(factor) || factor == 0 || std::abs(factor - 1) <= 2 * step) return {};
  if (!values.all([&](double x, double y) { return std::abs(y - factor * x) <= 2 * step * std::abs(y); })) return {};
  return factor == -1 ? "every sign is flipped" : fmt::format("scaled by a constant: b is a × {:.6g}", factor);
}

}  // namespace

std::string explain_values(const Both& both, const Subject& subject, const Difference& difference) {
  if (!castable(subject.a.dtype, DType::F64) || !castable(subject.b.dtype, DType::F64)) return {};
  const auto values = look(both, subject);
  const auto step = std::max(step_of(subject.a.dtype), step_of(subject.b.dtype));
  const auto apart = [&](double by) {
    return values.all([&](double x, double y) { return std::abs(y - x - by) <= step * std::max({1.0, std::abs(x), std::abs(y)}); });
  };
  if (subject.key.find("norm") != subject.key.npos && subject.key.ends_with(".weight")) {
    if (apart(1)) return "+1 norm: b is a + 1; a holds zero-centred weights (layernorm_zero_centered_gamma) where b does not";
    if (apart(-1)) return "+1 norm: b is a - 1; b holds zero-centred weights (layernorm_zero_centered_gamma) where a does not";
  }
  if (values.all([](double, double y) { return y == 0; })) return "all zeros in b";
  if (values.all([](double x, double) { return x == 0; })) return "all zeros in a";
  if (difference.count && difference.max_ulp <= 1) return "rounding: no number is further away than 1 ULP";
  if (difference.count && difference.max_abs == 0 && subject.a.dtype == subject.b.dtype) return "NaNs of other bits; the numbers are equal";
  if (auto text = explain_rounding(values, subject); !text.empty()) return text;
  return explain_factor(values, step);
}

}  // namespace shard::hints
