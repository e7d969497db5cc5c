// Sums are taken in rank order on every rank, so that they are the bits of ranks that are threads; NCCL's own order is a ring's.
#include "gpu/model/nccl_comm.h"

#include "gpu/ops/elementwise.h"

#include <algorithm>
#include <cstring>

namespace gpu {
namespace {

std::size_t bytes_of(const lm::Tensor& x) { return static_cast<std::size_t>(x.rows() * x.columns()) * size_of(x.dtype()); }

}  // namespace

std::vector<float> NcclComm::all_gather(std::span<const float> host) {
  std::vector<float> out(host.size() * static_cast<std::size_t>(size()));
  const auto mine = host.size_bytes(), everyones = out.size() * sizeof out[0];
  const auto memory = ops_.scratch(mine + everyones);
  auto* const all = memory.get() + mine;
  auto* const pinned = ops_.pinned(everyones);  // copies of other memory would block where a rank that fails is not heard of
  std::memcpy(pinned, host.data(), mine);
  to_device(memory.get(), pinned, mine, ops_.stream());
  peers_.all_gather(memory.get(), all, mine, ops_.stream());
  to_host(pinned, all, everyones, ops_.stream());
  peers_.wait(ops_.stream());
  std::memcpy(out.data(), pinned, everyones);
  return out;
}

template <typename Join>
void NcclComm::reduce(std::span<float> host, Join join) {
  const auto all = all_gather(host);
  for (std::size_t i = 0; i < host.size(); ++i) {
    host[i] = all[i];
    for (auto at = i + host.size(); at < all.size(); at += host.size()) host[i] = join(host[i], all[at]);
  }
}

void NcclComm::all_reduce_sum(std::span<float> host) {
  reduce(host, [](float a, float b) { return a + b; });
}
void NcclComm::all_reduce_max(std::span<float> host) {
  reduce(host, [](float a, float b) { return std::max(a, b); });
}

void NcclComm::all_reduce_sum(lm::Tensor& x) {
  if (size() == 1) return;
  const auto bytes = bytes_of(x);
  const auto all = ops_.scratch(bytes * static_cast<std::size_t>(size()));
  peers_.all_gather(x.data(), all.get(), bytes, ops_.stream());
  auto sum = ops_.make(shard::DType::F32, x.rows(), x.columns()), part = ops_.make(shard::DType::F32, x.rows(), x.columns());
  for (int r = 0; r < size(); ++r) {
    const View from{all.get() + bytes * static_cast<std::size_t>(r), x.dtype(), x.rows(), x.columns(), x.columns()};
    convert(ops_.stream(), view_of(r ? part : sum), from);
    if (r) add(ops_.stream(), view_of(sum), view_of(part));
  }
  convert(ops_.stream(), view_of(x), view_of(sum));
}

void NcclComm::send(int to, lm::Tensor x) {
  peers_.transfer({Communicator::Transfer::Way::Send, to, x.data(), bytes_of(x)}, ops_.stream());
}

void NcclComm::receive(int from, lm::Tensor& into) {
  peers_.transfer({Communicator::Transfer::Way::Receive, from, into.data(), bytes_of(into)}, ops_.stream());
}

}  // namespace gpu
