// What is seen of weights is what lm::look sees; of activations, what lm::cpu::stats does.
#include "gpu/ops/look.h"

#include "lm/look.h"
#include "tests/gpu/cpu_meaning.h"

using namespace meaning;

namespace {

gpu::WeightLook seen(const Tensor& values, shard::DType type) {
  const OnDevice weight(values, type);
  const Values<std::byte> scratch(gpu::look_scratch_bytes());
  const Values<gpu::WeightLook> out(1);
  gpu::look_at_weight(stream(), weight.view(), scratch.data(), out.data());
  return out.get()[0];
}

}  // namespace

TEST_CASE("weights: as lm::look, squares within 1e-6") {
  for (const auto& mode : kModes)
    for (const auto& [rows, columns] : {std::pair<Index, Index>{1, 1}, {33, 31}, {40, 96}})
      for (const int kind : {0, 1, 2, 3}) {
        auto values = random_tensor(mode, rows, columns);
        if (kind == 1)
          for (auto& value : values.values()) value = 0.5f;
        if (kind == 2) values.row(rows - 1)[columns - 1] = -INFINITY;
        if (kind == 3) values.row(rows / 2)[0] = NAN;
        const auto weight = weight_of(values, mode.type);
        const auto expected = lm::look({weight.data, values.values().size() * shard::size_of(mode.type)}, mode.type, 1);
        const auto out = seen(values, mode.type);
        CHECK((out.nonfinite != 0) == expected.nonfinite);
        CHECK((out.constant != 0) == expected.constant);
        if (kind == 3) continue;
        CHECK(out.max_abs == expected.max_abs);
        if (kind != 2) CHECK(std::abs(out.squares - expected.squares) <= 1e-6 * expected.squares);
      }
}

TEST_CASE("activations: finite ones are measured, others counted; the digest knows every bit and every place") {
  for (const auto& mode : kModes)
    for (const auto& [rows, columns] : {std::pair<Index, Index>{1, 1}, {33, 31}, {40, 96}}) {
      auto values = random_tensor(mode, rows, columns, 4);
      if (columns > 1) values.row(0)[1] = NAN, values.row(rows - 1)[0] = INFINITY;
      const OnDevice x(values, mode.type, columns + 5);
      const Values<std::byte> scratch(gpu::look_scratch_bytes());
      const Values<gpu::ActivationLook> out(1);
      const auto look = [&] {
        gpu::look_at_activation(stream(), x.view(), scratch.data(), out.data());
        return out.get()[0];
      };
      const auto given = x.get();  // NaNs as stored
      const auto expected = lm::cpu::stats(mode.on(), given);
      const auto squares = expected.rms * expected.rms * static_cast<double>(rows * columns);
      const auto first = look();
      CHECK(first.digest == expected.digest);
      CHECK(first.nonfinite == expected.nonfinite);
      CHECK(static_cast<double>(first.max_abs) == expected.max_abs);
      CHECK(std::abs(first.squares - squares) <= 1e-6 * squares);
      CHECK(look().squares == first.squares);
      if (columns > 1) {
        std::swap(values.row(0)[0], values.row(rows - 1)[2]);
        x.put(values);
        CHECK(look().digest != expected.digest);
      }
    }
}
