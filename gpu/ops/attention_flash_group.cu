// Flash attention in bf16 by warpgroups' products (gpu/warpgroup.h): two warpgroups have 64 queries each and share the keys and values, which are read from
// shared memory by the products themselves. While a tile of keys is worked on the next arrives.
#include "gpu/ops/attention_flash_rows.h"
#include "gpu/warpgroup.h"

namespace gpu {
namespace {

using Index = std::int64_t;

/// kKey, kValue: lanes of a head, filled up with zeros to a multiple of 64. kBlocks: how many of these share a multiprocessor.
template <int kKey, int kValue, unsigned kBlocks>
struct FlashGroup : FlashOperands {
  static constexpr int kQueries = 128, kKeys = 64;
  static constexpr unsigned kThreads = 256, kTogether = kBlocks;
  static constexpr std::size_t kMostShared = kMaxShared;  // warpgroups are of compute capability 9.0
  using Rows = FlashRows<kKeys, kValue>;
  template <int kRows, int kWidth>
  using Panels = Bf16[kWidth / 64][kRows][64];
  struct Shared {
    alignas(1024) Panels<kQueries, kKey> q;
    alignas(1024) Panels<kKeys, kKey> k[2];
    alignas(1024) Panels<kKeys, kValue> v[2];
  };
  struct Own : Rows::Own {
    std::uint32_t p[kKeys / 16][4];
  };
  template <typename Block>
  GPU_CODE void operator()(Block& block) const {
    auto& s = block.shared();
    const FlashBlock mine(*this, block.x(), kQueries, kKeys);
    const Rows rows{a, mine.start};
    const int key_size = static_cast<int>(a.key_size), value_size = static_cast<int>(a.value_size);
    const auto load_tile = [&](unsigned thread, int at, int slot) {
      load(thread, mine.k, k_stride, at, key_size, s.k[slot]);
      load(thread, mine.v, v_stride, at, value_size, s.v[slot]);
    };
    block.each_apart([&](unsigned thread, Own& own) {
      load(thread, mine.q, q_stride, mine.start, key_size, s.q);
      load_tile(thread, mine.first_key, 0);
      Rows::begin(own);
    });
    int slot = 0;
    for (int at = mine.first_key; at < mine.stop; at += kKeys, slot ^= 1) {
      block.each([&](unsigned, Own&) {  // this tile is there, and nobody reads the one before
        copy_async_wait();
        show_copies();
      });
      block.each_apart([&](unsigned thread, Own&) {
        if (at + kKeys < mine.stop) load_tile(thread, at + kKeys, slot ^ 1);
      });
      make_scores(block, s.q, s.k[slot]);
      rows.soften(block, at);
      add_values(block, s.v[slot]);
    }
    rows.finish(block, mine.head, mine.out, out_stride);
  }

 private:
  template <std::size_t kPanels, std::size_t kRows>
  GPU_CODE void load(unsigned thread, const Bf16* from, Index stride, int first, int width, Bf16 (&to)[kPanels][kRows][64]) const {
    load_rows<static_cast<int>(kRows), static_cast<int>(kPanels) * 8, static_cast<int>(kThreads)>(
        thread, from, stride, first, static_cast<int>(a.length), width, [&](int row, int chunk) { return &to[chunk / 8][row][chunk_place(row, chunk % 8) * 8]; });
  }

  template <typename Block>
  GPU_CODE static void make_scores(Block& block, const Panels<kQueries, kKey>& queries, const Panels<kKeys, kKey>& keys) {
    const auto registers = [](Own& own) -> GroupRegisters { return {own.s, nullptr}; };
    group_begin<kKeys, 0>(block, registers);
    GPU_UNROLL for (int d = 0; d < kKey; d += 16)
      group_product<kKeys>(block, [&](Own& own, unsigned group) -> GroupShares {
        return {own.s, &queries[d / 64][group * 64][d % 64], &keys[d / 64][0][d % 64], d == 0};
      });
    group_commit(block);
    group_wait<kKeys, 0>(block, registers);
  }

  template <typename Block>
  GPU_CODE static void add_values(Block& block, const Panels<kKeys, kValue>& values) {
    const auto registers = [](Own& own) -> GroupRegisters { return {own.o, own.p}; };
    block.each_apart([](unsigned, Own& own) {
      GPU_UNROLL for (int key = 0; key < kKeys; key += 16) Rows::pack(own, key, own.p[key / 16]);
    });
    group_begin<kValue, kKeys / 16>(block, registers);
    GPU_UNROLL for (int key = 0; key < kKeys; key += 16)
      group_product_turned<kValue>(block, [&](Own& own) -> GroupTurnedShares { return {own.o, own.p[key / 16], &values[0][key][0], sizeof values[0]}; });
    group_commit(block);
    group_wait<kValue, kKeys / 16>(block, registers);
  }
};

}  // namespace

bool flash_by_warpgroups(StreamView on, const AttentionScalars& a, const View& q, const View& k, const View& v, const View& out) {
  if (!has_warpgroups() || !tensor_cores_take(a, q, k, v, out)) return false;
  const auto fits = [&](std::int64_t key, std::int64_t value) { return a.key_size <= key && a.value_size <= value; };
  if (fits(64, 64)) return launch_flash<FlashGroup<64, 64, 2>>(on, a, q, k, v, out), true;
  if (fits(128, 128)) return launch_flash<FlashGroup<128, 128, 1>>(on, a, q, k, v, out), true;
  if (fits(192, 128)) return launch_flash<FlashGroup<192, 128, 1>>(on, a, q, k, v, out), true;
  return false;
}

}  // namespace gpu
