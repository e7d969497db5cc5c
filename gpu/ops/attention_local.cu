// Attention one query a block, and the softmax of stored scores.
#include "gpu/ops/attention_kernel.h"
#include "gpu/ops/linear.h"

namespace gpu {
namespace {

using Index = std::int64_t;

/// A running maximum and the sum of exponentials towards it, of a thread and then of a block.
struct RunningSum {
  float top, all, sum;

  GPU_CODE void start() { top = lowest(), sum = 0; }
  GPU_CODE void take(float score) {
    const float next = larger(top, score);
    sum = sum * weight_towards(top, next) + (next == lowest() ? 0.0f : expf(score - next));
    top = next;
  }
};

/// Own::running becomes the block's, sink included.
template <typename Block, typename Own>
GPU_CODE void join_running(Block& block, const AttentionScalars& a, Index head) {
  block.each_apart([](unsigned, Own& own) { own.top = own.running.top; });
  block.max(&Own::top);
  block.each_apart([&](unsigned, Own& own) {
    if (a.has_sink()) own.top = larger(own.top, a.sink(head));
    own.sum = own.running.sum * weight_towards(own.running.top, own.top);
  });
  block.sum(&Own::sum);
  block.each_apart([&](unsigned, Own& own) {
    if (a.has_sink()) own.sum += expf(a.sink(head) - own.top);
  });
}

template <typename T>
struct Local {
  static constexpr unsigned kThreads = 128;
  struct Shared {
    float p[kThreads];
  };
  struct Own {
    RunningSum running;
    float top, sum, out[kMaxValueSize / kThreads];
  };
  AttentionScalars a;
  const T* q;
  const T* k;
  const T* v;
  T* out;
  Index q_stride, k_stride, v_stride, out_stride;

  template <typename Block>
  GPU_CODE void operator()(Block& block) const {
    auto& s = block.shared();
    const Index at = block.x() % a.length, head = block.x() / a.length % a.heads, b = block.x() / a.length / a.heads;
    const auto* const query = q + (b * a.length + at) * q_stride + head * a.key_size;
    const auto* const keys = k + b * a.length * k_stride + a.key_head(head) * a.key_size;
    const auto* const values = v + b * a.length * v_stride + a.key_head(head) * a.value_size;
    const auto score = [&](Index j) {
      float sum = 0;
      for (Index d = 0; d < a.key_size; ++d) sum += widen(query[d]) * widen(keys[j * k_stride + d]);
      return a.score<T>(sum);
    };
    const auto first = a.first_key(at);
    block.each_apart([&](unsigned thread, Own& own) {
      own.running.start();
      for (auto j = first + thread; j <= at; j += kThreads) own.running.take(score(j));
      for (auto& sum : own.out) sum = 0;
    });
    join_running<Block, Own>(block, a, head);
    for (auto from = first; from <= at; from += kThreads) {
      const auto count = at + 1 - from < kThreads ? at + 1 - from : static_cast<Index>(kThreads);
      block.each([&](unsigned thread, Own& own) {
        if (thread < count) s.p[thread] = rounded<T>(expf(score(from + thread) - own.top) / own.sum);
      });
      block.each([&](unsigned thread, Own& own) {
        for (Index d = thread, i = 0; d < a.value_size; d += kThreads, ++i)
          for (Index j = 0; j < count; ++j) own.out[i] += s.p[j] * widen(values[(from + j) * v_stride + d]);
      });
    }
    block.each_apart([&](unsigned thread, Own& own) {
      auto* const to = out + (b * a.length + at) * out_stride + head * a.value_size;
      for (Index d = thread, i = 0; d < a.value_size; d += kThreads, ++i) to[d] = narrow<T>(own.out[i]);
    });
  }
};

template <typename T>
struct MaskedSoftmax {
  static constexpr unsigned kThreads = 128;
  struct Shared {};
  struct Own {
    RunningSum running;
    float top, sum;
  };
  AttentionScalars a;
  T* scores;
  Index stride;

  template <typename Block>
  GPU_CODE void operator()(Block& block) const {
    const Index at = block.x() % a.length, head = block.x() / a.length % a.heads, first = a.first_key(at);
    auto* const row = scores + static_cast<Index>(block.x()) * stride;
    block.each_apart([&](unsigned thread, Own& own) {
      own.running.start();
      for (auto j = first + thread; j <= at; j += kThreads) own.running.take(a.score<T>(widen(row[j])));
    });
    join_running<Block, Own>(block, a, head);
    block.each_apart([&](unsigned thread, Own& own) {
      for (Index j = thread; j < a.length; j += kThreads)
        row[j] = narrow<T>(j >= first && j <= at ? expf(a.score<T>(widen(row[j])) - own.top) / own.sum : 0.0f);
    });
  }
};

}  // namespace

void local_attention(StreamView on, const lm::AttentionShape& shape, const View& q, const View& k, const View& v, const View& sinks,
                     const View& out) {
  check_attention(shape, q, k, v, out);
  shard::require(shape.value_size <= kMaxValueSize, shard::Code::Device,
                 [&] { return fmt::format("device: value heads of {}; at most {} are provided for", shape.value_size, kMaxValueSize); });
  with_activation_type(q.type, [&]<typename T>(T) {
    const Local<T> kernel{attention_scalars(shape, sinks),
                          elements<const T>(q),
                          elements<const T>(k),
                          elements<const T>(v),
                          elements<T>(out),
                          q.stride,
                          k.stride,
                          v.stride,
                          out.stride};
    launch(on, {static_cast<std::uint64_t>(shape.batch * shape.heads * shape.length)}, kernel);
  });
}

void masked_softmax(StreamView on, const lm::AttentionShape& shape, const View& scores, const View& sinks) {
  shard::require(scores.rows == shape.batch * shape.heads * shape.length && scores.columns == shape.length, shard::Code::Device, [&] {
    return fmt::format("device: scores [{}, {}] for {} heads over {} × {} rows", scores.rows, scores.columns, shape.heads, shape.batch, shape.length);
  });
  with_activation_type(scores.type, [&]<typename T>(T) {
    launch(on, {static_cast<std::uint64_t>(scores.rows)}, MaskedSoftmax<T>{attention_scalars(shape, sinks), elements<T>(scores), scores.stride});
  });
}

std::size_t scores_bytes(const lm::AttentionShape& shape, shard::DType type) {
  return static_cast<std::size_t>(shape.batch * shape.heads * shape.length * shape.length) * shard::size_of(type);
}

void unfused_attention(StreamView on, const lm::AttentionShape& shape, const View& q, const View& k, const View& v, const View& sinks,
                       const View& scores, const View& out) {
  check_attention(shape, q, k, v, out);
  const auto length = shape.length, square = length * scores.stride;
  const auto of = [&](const View& view, Index rows, Index columns) { return View{view.data, view.type, rows, columns, view.stride}; };
  BatchedProduct p;
  p.outer = shape.batch, p.inner = shape.heads, p.first = shape.first_head, p.ratio = shape.ratio;
  p.x = of(q, length, shape.key_size), p.w = of(k, length, shape.key_size), p.out = of(scores, length, length);
  p.x_outer = length * q.stride, p.x_inner = shape.key_size;
  p.w_outer = length * k.stride, p.w_inner = shape.key_size;
  p.out_outer = shape.heads * square, p.out_inner = square;
  batched_product(on, p);
  masked_softmax(on, shape, scores, sinks);
  p.x = of(scores, length, length), p.out = of(out, length, shape.value_size);
  p.w = {v.data, v.type, shape.value_size, length, 1}, p.w_k_stride = v.stride;  // values as stored are [k, n]
  p.x_outer = shape.heads * square, p.x_inner = square;
  p.w_outer = length * v.stride, p.w_inner = shape.value_size;
  p.out_outer = length * out.stride, p.out_inner = shape.value_size;
  batched_product(on, p);
}

}  // namespace gpu
