// Norms, rotation, gathers and copies against the CPU's.
#include "gpu/ops/normalize.h"
#include "gpu/ops/rope.h"
#include "gpu/ops/rows.h"

#include "tests/gpu/cpu_meaning.h"

using namespace meaning;

namespace {

gpu::View none;

}  // namespace

TEST_CASE("norms are the CPU's within 1e-6 of f32 or one rounding of bf16") {
  using enum shard::Normalization;
  for (const auto& mode : kModes)
    for (const auto kind : {RMSNorm, LayerNorm})
      for (const bool centered : {false, true})
        for (const auto& [rows, columns] : {std::pair<Index, Index>{7, 33}, {7, 80}, {7, 640}, {7, 1031}, {513, 640}})  // many rows go to warps
          for (const int parameters : {0, 1, 2}) {
            CAPTURE(mode.bf16());
            CAPTURE(static_cast<int>(kind));
            CAPTURE(centered);
            CAPTURE(columns);
            CAPTURE(parameters);
            CAPTURE(rows);
            const auto x = random_tensor(mode, rows, columns, 3), w = random_tensor(mode, 1, columns), b = random_tensor(mode, 1, columns);
            const OnDevice in(x, mode.type, columns + 8), weight(w, mode.type), bias(b, mode.type), out(rows, columns, mode.type);
            gpu::normalize(stream(), {kind, 1e-5, centered}, in.view(), parameters > 0 ? weight.view() : none, parameters > 1 ? bias.view() : none,
                           out.view());
            const auto expected = lm::cpu::normalize(mode.on(), x, kind, 1e-5, centered, parameters > 0 ? weight_of(w, mode.type) : lm::Weight{},
                                                     parameters > 1 ? weight_of(b, mode.type) : lm::Weight{});
            CHECK(worst(out.get(), expected) <= bound(mode, 1e-6));
          }
}

TEST_CASE("a sum and its norm in one op are what two ops make") {
  for (const auto& mode : kModes)
    for (const auto& [rows, columns] : {std::pair<Index, Index>{33, 40}, {33, 600}, {513, 600}}) {
      auto hidden = random_tensor(mode, rows, columns);
      const auto branch = random_tensor(mode, rows, columns), w = random_tensor(mode, 1, columns);
      const OnDevice x(hidden, mode.type), more(branch, mode.type), weight(w, shard::DType::F32), out(rows, columns, mode.type);
      gpu::add_normalize(stream(), {}, x.view(), more.view(), weight.view(), none, out.view());
      lm::cpu::add(mode.on(), hidden, branch);
      CHECK(worst(x.get(), hidden) == 0);
      const auto expected = lm::cpu::normalize(mode.on(), hidden, shard::Normalization::RMSNorm, 1e-5, false, weight_of(w, shard::DType::F32), {});
      CHECK(worst(out.get(), expected) <= bound(mode, 1e-6));
    }
}

TEST_CASE("norms of heads' pieces leave the other lanes alone") {
  for (const auto& mode : kModes)
    for (const Index width : {40, 96}) {
      auto x = random_tensor(mode, 7, 3 * width + 5);
      const auto w = random_tensor(mode, 1, width);
      const OnDevice on_device(x, mode.type), weight(w, mode.type);
      gpu::normalize_pieces(stream(), {shard::Normalization::RMSNorm, 1e-6, true}, on_device.view(), 3, width, weight.view(), none);
      lm::cpu::normalize_pieces(mode.on(), x.row(0), x.rows(), x.columns(), 3, width, shard::Normalization::RMSNorm, 1e-6, true,
                                weight_of(w, mode.type), {});
      CHECK(worst(on_device.get(), x) <= bound(mode, 1e-6));
    }
}

TEST_CASE("rotation is the CPU's; in bf16 to the bit") {
  for (const auto& mode : kModes)
    for (const bool interleaved : {false, true})
      for (const Index size : {40, 96})
        for (const Index dim : {Index{10}, size}) {
          CAPTURE(mode.bf16());
          CAPTURE(interleaved);
          CAPTURE(size);
          CAPTURE(dim);
          shard::RopeConfig config;
          config.type = shard::RopeConfig::Type::Default;
          config.dim = dim;
          config.interleaved = interleaved;
          const auto table = lm::cpu::rope_table(config, 11);
          const Values<float> cos(table.cos), sin(table.sin);
          auto x = random_tensor(mode, 33, 3 * size);
          const OnDevice on_device(x, mode.type, 3 * size + 8);
          gpu::apply_rope(stream(), {cos.data(), sin.data(), table.half, interleaved}, on_device.view(), 3, size, 11);
          lm::cpu::apply_rope(mode.on(), table, x.row(0), x.rows(), x.columns(), 3, size, 11);
          CHECK(worst(on_device.get(), x) <= (mode.bf16() ? 0 : 2e-7));
        }
}

TEST_CASE("embedding rows: those of other ranks are zeros, the multiplier rounds once") {
  for (const auto& mode : kModes)
    for (const Index columns : {33, 64}) {
      const auto table = random_tensor(mode, 20, columns);
      const std::vector<std::int64_t> ids{3, 0, 19, 7, 7, 12, -100};
      const Values<std::int64_t> where(ids);
      const OnDevice rows(table, mode.type), out(7, columns, mode.type);
      gpu::gather(stream(), out.view(), rows.view().row_range(5, 10), 5, where.data(), 5.65);
      Tensor expected(7, columns);
      for (Index t = 0; t < 7; ++t)
        for (Index c = 0; c < columns; ++c) {
          const auto id = ids[static_cast<std::size_t>(t)];
          expected.row(t)[c] = id >= 5 && id < 15 ? table.row(id)[c] : 0.0f;
        }
      lm::cpu::scale(mode.on(), expected, 5.65);
      CHECK(worst(out.get(), expected) == 0);
    }
}

TEST_CASE("rows by number, with weights") {
  for (const auto& mode : kModes) {
    const auto x = random_tensor(mode, 9, 40);
    const std::vector<std::int32_t> rows{8, 0, 0, 5};
    const std::vector<float> w{0.25f, 1.5f, -1, 0.3f};
    const Values<std::int32_t> where(rows);
    const Values<float> weights(w);
    const OnDevice in(x, mode.type), out(4, 40, mode.type);
    for (const bool weighed : {false, true}) {
      gpu::gather_rows(stream(), out.view(), in.view(), where.data(), weighed ? weights.data() : nullptr);
      Tensor expected(4, 40);
      for (std::size_t i = 0; i < 4; ++i)
        for (Index c = 0; c < 40; ++c) expected.row(static_cast<Index>(i))[c] = x.row(rows[i])[c] * (weighed ? w[i] : 1.0f);
      lm::cpu::round_values(mode.on(), expected.values());
      CHECK(worst(out.get(), expected) == 0);
    }
  }
}

TEST_CASE("pieces: latent attention's keys from each head's lanes and the lanes that all heads share") {
  for (const auto& mode : kModes)
    for (const Index nope : {16, 5}) {
      const Index heads = 3, turned = 8, value = 12;
      const auto kv = random_tensor(mode, 7, heads * (nope + value)), shared = random_tensor(mode, 7, 20);
      const OnDevice from(kv, mode.type), one(shared, mode.type), k(7, heads * (nope + turned), mode.type), v(7, heads * value, mode.type);
      const gpu::Piece pieces[] = {
          {from.view().column_range(0, nope), k.view().column_range(0, nope), heads, nope + value, nope + turned},
          {one.view().column_range(12, turned), k.view().column_range(nope, turned), heads, 0, nope + turned},
          {from.view().column_range(nope, value), v.view().column_range(0, value), heads, nope + value, value},
      };
      gpu::copy_pieces(stream(), pieces);
      Tensor keys(7, heads * (nope + turned)), values(7, heads * value);
      for (Index r = 0; r < 7; ++r)
        for (Index h = 0; h < heads; ++h) {
          const auto* lanes = kv.row(r) + h * (nope + value);
          std::copy(shared.row(r) + 12, shared.row(r) + 20, std::copy(lanes, lanes + nope, keys.row(r) + h * (nope + turned)));
          std::copy(lanes + nope, lanes + nope + value, values.row(r) + h * value);
        }
      CHECK(worst(k.get(), keys) == 0);
      CHECK(worst(v.get(), values) == 0);
    }
}
