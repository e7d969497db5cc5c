// Which backend computes attention, and the way there.
#include "gpu/model/device_ops.h"
#include "gpu/ops/attention.h"
#include "libshard/error.h"

namespace gpu {
namespace {

using lm::AttentionBackend;

/// Sequence b of a batch.
View sequence(const View& x, std::int64_t length, std::int64_t b) { return x ? x.row_range(b * length, length) : x; }

}  // namespace

lm::AttentionBackend choose_attention(AttentionBackend asked, const lm::AttentionShape& shape) {
  const bool flash = shape.key_size <= kMaxFlashHead && shape.value_size <= kMaxFlashHead, local = shape.value_size <= kMaxValueSize;
  if (asked == AttentionBackend::Auto) return flash ? AttentionBackend::Flash : local ? AttentionBackend::Local : AttentionBackend::Unfused;
  shard::require(asked != AttentionBackend::Flash || flash, shard::Code::Device,
                 [&] { return fmt::format("--attention-backend flash: heads of {} and {} lanes; at most {} are supported; local and unfused take more", shape.key_size, shape.value_size, kMaxFlashHead); });
  shard::require(asked != AttentionBackend::Local || local, shard::Code::Device,
                 [&] { return fmt::format("--attention-backend local: value heads of {} lanes; at most {} are supported; unfused takes more", shape.value_size, kMaxValueSize); });
  return asked;
}

lm::Tensor DeviceOps::attention(const lm::AttentionShape& shape, const Tensor& q, const Tensor& k, const Tensor& v, const lm::Weight& sinks) {
  auto out = make(q.rows(), shape.heads * shape.value_size);
  switch (choose_attention(options_.attention, shape)) {
    case AttentionBackend::Flash: flash_attention(stream_, shape, view_of(q), view_of(k), view_of(v), view_of(sinks), view_of(out)); break;
    case AttentionBackend::Fused: fused(shape, view_of(q), view_of(k), view_of(v), static_cast<bool>(sinks), view_of(out)); break;
    case AttentionBackend::Unfused: unfused(shape, view_of(q), view_of(k), view_of(v), view_of(sinks), view_of(out)); break;
    default: local_attention(stream_, shape, view_of(q), view_of(k), view_of(v), view_of(sinks), view_of(out));
  }
  return out;
}

void DeviceOps::fused(const lm::AttentionShape& shape, const View& q, const View& k, const View& v, bool sinks, const View& out) {
  shard::require(shape.first_head == 0 && shape.heads % shape.ratio == 0, shard::Code::Device,
                 [&] { return fmt::format("--attention-backend fused: {} heads of a rank share key heads with other ranks'; cuDNN takes whole groups of {}", shape.heads, shape.ratio); });
  if (!fused_) fused_.emplace(options_.device, options_.cudnn);
  AttentionShape whole;
  whole.batch = shape.batch, whole.heads = shape.heads, whole.groups = shape.heads / shape.ratio;
  whole.queries = whole.keys = shape.length;
  whole.head_size = shape.key_size, whole.value_size = shape.value_size;
  whole.type = q.type;
  whole.window = shape.window, whole.softcap = shape.softcap, whole.sinks = sinks || shape.off_by_one;
  const auto strides = [&](const View& x, Index head) { return AttentionStrides{shape.length * x.stride, head, x.stride}; };
  whole.q = strides(q, shape.key_size), whole.k = strides(k, shape.key_size), whole.v = strides(v, shape.value_size), whole.out = strides(out, shape.value_size);
  (*fused_)(whole, {q.data, k.data, v.data, out.data, static_cast<float>(shape.scale)}, stream_);
}

void DeviceOps::unfused(lm::AttentionShape shape, const View& q, const View& k, const View& v, const View& sinks, const View& out) {
  const auto sequences = std::exchange(shape.batch, 1), length = shape.length;
  const auto scores = make(q.type, shape.heads * length, length);  // of one sequence at a time
  for (Index b = 0; b < sequences; ++b) {
    const auto queries = sequence(q, length, b), keys = sequence(k, length, b), values = sequence(v, length, b), sums = sequence(out, length, b), weights = view_of(scores);
    if (!matmul_) {
      unfused_attention(stream_, shape, queries, keys, values, sinks, weights, sums);
      continue;
    }
    // The heads of one key head are a batch that shares its keys and values.
    const auto for_groups = [&](const auto& body) {
      for (Index h = 0; h < shape.heads;) {
        const auto group = (shape.first_head + h) / shape.ratio, end = std::min(shape.heads, (group + 1) * shape.ratio - shape.first_head);
        body(group, h, end - h);
        h = end;
      }
    };
    MatmulShape scored;
    scored.rows = scored.columns = length, scored.inner = shape.key_size;
    scored.type = scored.w_type = scored.out_type = q.type;
    scored.x_pitch = q.stride, scored.w_pitch = k.stride, scored.out_pitch = length;
    scored.x_step = shape.key_size, scored.out_step = length * length;
    scored.tf32 = options_.tf32;
    for_groups([&](Index group, Index first, Index heads) {
      scored.batch = heads;
      (*matmul_)(scored, {queries.at(0, first * shape.key_size), keys.at(0, group * shape.key_size), nullptr, weights.at(first * length, 0)}, stream_);
    });
    masked_softmax(stream_, shape, weights, sinks);
    MatmulShape summed;
    summed.rows = length, summed.columns = shape.value_size, summed.inner = length;
    summed.type = summed.w_type = summed.out_type = q.type;
    summed.x_pitch = length, summed.w_pitch = v.stride, summed.out_pitch = out.stride;
    summed.w_by_inner = true;
    summed.x_step = length * length, summed.out_step = shape.value_size;
    summed.tf32 = options_.tf32;
    for_groups([&](Index group, Index first, Index heads) {
      summed.batch = heads;
      (*matmul_)(summed, {weights.at(first * length, 0), values.at(0, group * shape.value_size), nullptr, sums.at(0, first * shape.value_size)}, stream_);
    });
  }
}

}  // namespace gpu
