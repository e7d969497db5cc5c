// The vendors' libraries at the sizes of real models, against our own kernels, which smaller tests hold to the CPU's meaning.
#include "gpu/libs/cublaslt.h"
#include "gpu/libs/cudnn.h"
#include "gpu/libs/nccl.h"
#include "gpu/ops/attention.h"
#include "gpu/ops/linear.h"
#include "libshard/error.h"
#include "tests/gpu/cpu_meaning.h"

using namespace meaning;
using shard::DType;

namespace {

/// [rows, columns] of random numbers of a type.
OnDevice random_on_device(Index rows, Index columns, DType type, float spread = 1) {
  Tensor values(rows, columns);
  for (auto& value : values.values()) value = random_value(spread);
  return {values, type};
}

}  // namespace

TEST_CASE("cuBLASLt's products are ours, within the rounding of the output") {
  gpu::Matmul matmul(0);
  for (const auto& mode : kModes)
    for (const auto& [rows, columns, inner] : {std::array<Index, 3>{1, 2048, 2048}, {300, 1000, 520}, {2048, 5632, 2048}}) {
      CAPTURE(mode.bf16());
      CAPTURE(rows);
      const auto x = random_on_device(rows, inner, mode.type), w = random_on_device(columns, inner, mode.type, 0.05f), bias = random_on_device(1, columns, mode.type);
      const OnDevice mine(rows, columns, mode.type), theirs(rows, columns, mode.type);
      gpu::linear(stream(), x.view(), w.view(), bias.view(), mine.view());
      matmul({.rows = rows, .columns = columns, .inner = inner, .type = mode.type, .out_type = mode.type, .x_pitch = inner, .w_pitch = inner, .out_pitch = columns, .bias = true, .w_type = mode.type},
             {.x = x.view().data, .w = w.view().data, .bias = bias.view().data, .out = theirs.view().data}, stream());
      CHECK(worst(theirs.get(), mine.get()) <= bound(mode, 3e-6));
    }
}

TEST_CASE("cuDNN's fused attention is ours, within bf16") {
  gpu::FusedAttention fused(0);
  for (const auto& [batch, length, heads, ratio, size, window] :
       {std::array<Index, 6>{2, 1024, 32, 8, 64, 0}, {1, 333, 8, 1, 128, 0}, {1, 1024, 8, 2, 128, 100}, {2, 64, 4, 1, 64, 0}}) {
    CAPTURE(length);
    CAPTURE(window);
    lm::AttentionShape shape{batch, length, heads, ratio, 0, size, size, 1 / std::sqrt(static_cast<double>(size)), 0, 0, false};
    shape.window = window;
    const auto groups = heads / ratio;
    const auto q = random_on_device(batch * length, heads * size, DType::BF16), k = random_on_device(batch * length, groups * size, DType::BF16),
               v = random_on_device(batch * length, groups * size, DType::BF16);
    const OnDevice mine(batch * length, heads * size, DType::BF16), theirs(batch * length, heads * size, DType::BF16);
    gpu::flash_attention(stream(), shape, q.view(), k.view(), v.view(), {}, mine.view());
    gpu::AttentionShape asked{.batch = batch, .heads = heads, .groups = groups, .queries = length, .keys = length, .head_size = size, .value_size = size};
    asked.window = window;
    asked.q = asked.out = {length * heads * size, size, heads * size};
    asked.k = asked.v = {length * groups * size, size, groups * size};
    CHECK(fused.why_not(asked) == "");
    fused(asked, {q.view().data, k.view().data, v.view().data, theirs.view().data, static_cast<float>(shape.scale)}, stream());
    CHECK(worst(theirs.get(), mine.get()) <= 1.0 / 64);
  }
}

TEST_CASE("two ranks on this board do not choose NCCL, which takes one rank a device") {
  const gpu::Nccl nccl;
  const auto board = gpu::device_info(0).id;
  const std::vector<gpu::RankDevice> ranks{{board, nccl.version(), ""}, {board, nccl.version(), ""}};
  CHECK(!gpu::choose_transport(ranks).nccl);
}
