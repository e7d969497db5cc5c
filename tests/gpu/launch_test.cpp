// Every op at the sizes of real models: launches that a device takes, recorded and dropped, since the host would need hours.
#include "gpu/ops/attention.h"
#include "gpu/ops/cross_entropy.h"
#include "gpu/ops/elementwise.h"
#include "gpu/ops/linear.h"
#include "gpu/ops/look.h"
#include "gpu/ops/normalize.h"
#include "gpu/ops/rope.h"
#include "gpu/ops/route.h"
#include "gpu/ops/rows.h"

#include "tests/gpu/cpu_meaning.h"

using namespace meaning;

namespace {

/// Addresses that nothing reads.
template <typename T>
T* nowhere() {
  return reinterpret_cast<T*>(std::uintptr_t{1} << 40);
}
gpu::View view(shard::DType type, Index rows, Index columns) { return {nowhere<std::byte>(), type, rows, columns, columns}; }

void record(shard::DType type, Index batch, Index length) {
  auto& on = stream();
  const auto at = [&](Index rows, Index columns) { return view(type, rows, columns); };
  const Index rows = batch * length, hidden = 7168, wide = 18432, vocabulary = 131072, experts = 256, topk = 8;
  gpu::add(on, at(rows, hidden), at(rows, hidden));
  gpu::scale(on, at(rows, vocabulary), 0.5);
  gpu::softcap(on, at(rows, vocabulary), 30);
  gpu::activate(on, {}, at(rows, wide), at(rows, wide));
  gpu::activate(on, {}, at(rows, 2 * wide).column_range(0, wide), at(rows, 2 * wide).column_range(wide, wide));
  gpu::scale_rows(on, at(rows * topk, 2048), nowhere<float>());
  gpu::add_weighted_bias(on, at(rows * topk, hidden), at(1, hidden), nowhere<float>());
  gpu::gate_rows(on, at(rows, hidden), at(rows, 1));
  gpu::convert(on, view(shard::DType::F32, rows, vocabulary), at(rows, vocabulary));
  gpu::fill(on, at(rows, hidden), 0);
  gpu::normalize(on, {}, at(rows, hidden), at(1, hidden), {}, at(rows, hidden));
  gpu::add_normalize(on, {}, at(rows, hidden), at(rows, hidden), at(1, hidden), {}, at(rows, hidden));
  gpu::normalize_pieces(on, {}, at(rows, 128 * 128), 128, 128, at(1, 128), {});
  gpu::apply_rope(on, {nowhere<float>(), nowhere<float>(), 64, false}, at(rows, 128 * 128), 128, 128, length);
  gpu::gather(on, at(rows, hidden), at(vocabulary, hidden), 0, nowhere<std::int64_t>());
  gpu::gather_rows(on, at(rows * topk, hidden), at(rows, hidden), nowhere<std::int32_t>());
  const gpu::Piece piece{at(rows, 128 * 256).column_range(0, 128), at(rows, 128 * 192).column_range(0, 128), 128, 256, 192};
  gpu::copy_pieces(on, {&piece, 1});
  gpu::linear(on, at(rows, hidden), at(vocabulary, hidden), {}, at(rows, vocabulary));
  const auto few = at(std::min(rows, gpu::kThinRows), hidden), every = at(vocabulary, hidden);
  const gpu::LinearViews thin{every, {}, at(few.rows, vocabulary)};
  if (gpu::is_thin(few, every)) gpu::thin_linears(on, few, {&thin, 1});
  shard::RouterConfig router;
  router.topk = topk;
  gpu::route(on, router, view(shard::DType::F32, rows, experts), {}, false, nowhere<std::int32_t>(), nowhere<float>());
  const gpu::Permutation order{nowhere<std::int32_t>(), nowhere<std::int32_t>(), nowhere<std::int32_t>(), nowhere<float>(), nowhere<std::int32_t>()};
  gpu::permute(on, rows, topk, experts, nowhere<std::int32_t>(), nowhere<float>(), order);
  gpu::grouped_linear(on, at(rows * topk, hidden), {nowhere<const std::byte*>(), nullptr, type, 2048, hidden, hidden}, experts, order.offsets,
                      order.tiles, nullptr, at(rows * topk, 2048));
  gpu::combine(on, at(rows, hidden), at(rows * topk, hidden), topk, order.row);
  const gpu::CrossEntropyState state{nowhere<float>(), nowhere<double>(), nowhere<float>(), rows};
  gpu::cross_entropy_start(on, state);
  gpu::cross_entropy_add(on, state, at(rows, vocabulary), 0, vocabulary, nowhere<std::int64_t>(), nowhere<gpu::LogitsPeak>());
  gpu::cross_entropy_shift(on, state, nowhere<float>());
  gpu::cross_entropy_finish(on, state, vocabulary, nowhere<std::int64_t>(), nowhere<float>());
  gpu::look_at_weight(on, at(vocabulary, hidden), nowhere<std::byte>(), nowhere<gpu::WeightLook>());
  gpu::look_at_activation(on, at(rows, hidden), nowhere<std::byte>(), nowhere<gpu::ActivationLook>());
  for (const Index key : {64, 128, 192}) {
    const lm::AttentionShape shape{batch, length, 128, 1, 0, key, 128, 0.1, 0, 0, false};
    gpu::local_attention(on, shape, at(rows, 128 * key), at(rows, 128 * key), at(rows, 128 * 128), {}, at(rows, 128 * 128));
    gpu::flash_attention(on, shape, at(rows, 128 * key), at(rows, 128 * key), at(rows, 128 * 128), {}, at(rows, 128 * 128));
    gpu::unfused_attention(on, shape, at(rows, 128 * key), at(rows, 128 * key), at(rows, 128 * 128), {}, at(batch * 128 * length, length),
                           at(rows, 128 * 128));
  }
}

}  // namespace

TEST_CASE("launches at the sizes of real models") {
  for (const auto& mode : kModes)
    for (const auto& [batch, length] : {std::pair<Index, Index>{8, 2048}, {1, 131072}, {1, 1}}) {
      CAPTURE(length);
      gpu::Graph::begin(stream());
      CHECK_NOTHROW(record(mode.type, batch, length));
      gpu::Graph::end(stream());
    }
}
