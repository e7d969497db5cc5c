// The loss against lm::cpu::CrossEntropy, over blocks and over two ranks.
#include "gpu/ops/cross_entropy.h"

#include "lm/cpu/cross_entropy.h"
#include "tests/gpu/cpu_meaning.h"

using namespace meaning;

namespace {

struct State {
  Values<float> top, target;
  Values<double> sum;
  explicit State(std::size_t rows) : top(rows), target(rows), sum(rows) { gpu::cross_entropy_start(stream(), view(rows)); }
  gpu::CrossEntropyState view(std::size_t rows) const { return {top.data(), sum.data(), target.data(), static_cast<Index>(rows)}; }
};

Tensor columns_of(const Tensor& x, Index lo, Index count) {
  Tensor out(x.rows(), count);
  for (Index r = 0; r < x.rows(); ++r) std::copy(x.row(r) + lo, x.row(r) + lo + count, out.row(r));
  return out;
}

std::vector<float> expected(const Mode& mode, const Tensor& logits, const std::vector<Index>& labels, Index limit) {
  lm::cpu::CrossEntropy loss(mode.on(), labels, limit);
  loss.add(logits, 0);
  lm::Group alone(1);
  lm::LocalComm comm(alone, 0);
  return loss.finish(comm);
}

double apart(const std::vector<float>& a, const std::vector<float>& b) {
  double most = 0;
  for (std::size_t i = 0; i < a.size(); ++i)
    most = std::max(most, std::abs(static_cast<double>(a[i]) - static_cast<double>(b[i])) / std::max(1.0, std::abs(static_cast<double>(b[i]))));
  return most;
}

}  // namespace

TEST_CASE("losses over blocks are the CPU's within 1e-6, labels out of range and columns beyond the limit included") {
  for (const auto& mode : kModes)
    for (const float spread : {1.0f, 30.0f})
      for (const Index limit : {333, 300}) {
        const std::size_t rows = 7;
        const auto logits = random_tensor(mode, 7, 333, spread);
        const std::vector<Index> labels{0, 299, 332, -100, 17, 4000, 128};
        const Values<std::int64_t> where(labels);
        const State state(rows);
        const OnDevice all(logits, mode.type, 336);
        for (const auto& [first, count] : {std::pair<Index, Index>{0, 128}, {128, 1}, {129, 204}})
          gpu::cross_entropy_add(stream(), state.view(rows), all.view().column_range(first, count), first, limit, where.data());
        const Values<float> losses(rows);
        gpu::cross_entropy_finish(stream(), state.view(rows), limit, where.data(), losses.data());
        CHECK(apart(losses.get(), expected(mode, logits, labels, limit)) <= 1e-6);
      }
}

TEST_CASE("two ranks' halves add up to the whole") {
  const auto& mode = kModes[0];
  const auto logits = random_tensor(mode, 7, 96, 10);
  const std::vector<Index> labels{0, 95, 47, 48, 17, -1, 60};
  const Values<std::int64_t> where(labels);
  const State left(7), right(7);
  const OnDevice a(columns_of(logits, 0, 48), mode.type), b(columns_of(logits, 48, 48), mode.type);
  gpu::cross_entropy_add(stream(), left.view(7), a.view(), 0, 96, where.data());
  gpu::cross_entropy_add(stream(), right.view(7), b.view(), 48, 96, where.data());
  auto top = left.top.get();
  const auto other = right.top.get();
  for (std::size_t i = 0; i < 7; ++i) top[i] = std::max(top[i], other[i]);
  const Values<float> tops(top);
  for (const auto* state : {&left, &right}) gpu::cross_entropy_shift(stream(), state->view(7), tops.data());
  auto sum = left.sum.get();
  auto target = left.target.get();
  const auto more = right.sum.get();
  const auto more_target = right.target.get();
  for (std::size_t i = 0; i < 7; ++i) sum[i] += more[i], target[i] += more_target[i];
  const Values<double> sums(sum);
  const Values<float> targets(target), losses(7);
  gpu::cross_entropy_finish(stream(), {tops.data(), sums.data(), targets.data(), 7}, 96, where.data(), losses.data());
  CHECK(apart(losses.get(), expected(mode, logits, labels, 96)) <= 1e-6);
}

TEST_CASE("a logit that is no number makes its row's loss none; −∞ does not") {
  auto logits = random_tensor(kModes[0], 2, 40);
  logits.row(0)[3] = NAN;
  for (Index c = 0; c < 33; ++c) logits.row(1)[c] = -INFINITY;
  const Values<std::int64_t> where(std::vector<Index>{1, 35});
  const State state(2);
  const OnDevice all(logits, shard::DType::F32);
  gpu::cross_entropy_add(stream(), state.view(2), all.view(), 0, 40, where.data());
  const Values<float> losses(2);
  gpu::cross_entropy_finish(stream(), state.view(2), 40, where.data(), losses.data());
  const auto out = losses.get();
  CHECK(std::isnan(out[0]));
  CHECK(std::isfinite(out[1]));
}

TEST_CASE("the peak and the count of non-finite logits, over the real vocabulary") {
  for (const auto& mode : kModes) {
    auto logits = random_tensor(mode, 7, 5000);
    logits.row(3)[4500] = -64;
    logits.row(2)[4999] = 100;  // padding
    logits.row(1)[0] = NAN;
    logits.row(6)[4600] = -INFINITY;
    const OnDevice all(logits, mode.type);
    const Values<gpu::LogitsPeak> out(std::vector<gpu::LogitsPeak>(1));
    const State state(7);
    const Values<std::int64_t> labels(std::vector<Index>(7, 0));
    for (const auto& [first, count] : {std::pair<Index, Index>{0, 4500}, {4500, 500}})
      gpu::cross_entropy_add(stream(), state.view(7), all.view().column_range(first, count), first, 4990, labels.data(), out.data());
    CHECK(std::bit_cast<float>(out.get()[0].peak_bits) == 64);
    CHECK(out.get()[0].nonfinite == 2);
  }
}
