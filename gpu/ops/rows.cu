// Gathers and strided copies, several elements a thread where alignment lets them.
#include "gpu/ops/rows.h"

#include "gpu/ops/numbers.h"

#include <algorithm>

namespace gpu {
namespace {

using Index = std::int64_t;

/// Id: how row numbers are stored.
template <typename T, typename Id, int N>
struct Gather {
  static constexpr unsigned kThreads = 128;
  struct Shared {};
  struct Own {};
  T* out;
  Numbers table;
  const Id* ids;
  const float* weights;
  Index out_stride, table_stride, table_rows, lo, rows, columns, row_step;
  float multiplier;

  template <typename Block>
  GPU_CODE void operator()(Block& block) const {
    block.each_apart([&](unsigned thread, Own&) {
      const auto column = (static_cast<Index>(block.x()) * kThreads + thread) * N;
      if (column >= columns) return;
      for (Index r = block.y(); r < rows; r += row_step) {
        const auto row = static_cast<Index>(ids[r]) - lo;
        float x[N] = {};
        if (row >= 0 && row < table_rows) table.template read<N>(row * table_stride + column, x);
        const float factor = weights ? weights[r] : multiplier;
        Pack<T, N> made;
        for (int j = 0; j < N; ++j) made.item[j] = narrow<T>(x[j] * factor);
        store_pack<N>(out + r * out_stride + column, made);
      }
    });
  }
};

template <typename Id>
void start_gather(StreamView on, const View& out, const View& table, Index lo, const Id* ids, const float* weights, double multiplier) {
  shard::require(out.columns == table.columns, shard::Code::Device,
                 [&] { return fmt::format("device: rows of {} numbers into rows of {}", table.columns, out.columns); });
  with_activation_type(out.type, [&]<typename T>(T) {
    const auto run = [&]<int N>() {
      const Gather<T, Id, N> kernel{elements<T>(out),
                                    numbers(table),
                                    ids,
                                    weights,
                                    out.stride,
                                    table.stride,
                                    table.rows,
                                    lo,
                                    out.rows,
                                    out.columns,
                                    std::min<Index>(out.rows, 65535),
                                    static_cast<float>(multiplier)};
      launch(on, {blocks_for(static_cast<std::uint64_t>(out.columns), kernel.kThreads * N), static_cast<std::uint64_t>(kernel.row_step)}, kernel);
    };
    constexpr int n = kPack<T>;
    in_packs(out, n) && in_packs(table, n) ? run.template operator()<n>() : run.template operator()<1>();
  });
}

constexpr std::size_t kMaxPieces = 4;

template <typename T, int N>
struct CopyPieces {
  static constexpr unsigned kThreads = 128;
  struct Shared {};
  struct Own {};
  struct One {
    const T* from;
    T* to;
    Index from_stride, to_stride, heads, width, from_step, to_step;
  };
  One pieces[kMaxPieces];
  Index rows, row_step;

  template <typename Block>
  GPU_CODE void operator()(Block& block) const {
    const One& one = pieces[block.z()];
    block.each_apart([&](unsigned thread, Own&) {
      const auto task = (static_cast<Index>(block.x()) * kThreads + thread) * N;
      if (task >= one.heads * one.width) return;
      const auto head = task / one.width, lane = task % one.width;
      for (Index r = block.y(); r < rows; r += row_step)
        store_pack<N>(one.to + r * one.to_stride + head * one.to_step + lane,
                      load_pack<N>(one.from + r * one.from_stride + head * one.from_step + lane));
    });
  }
};

template <typename T, int N>
struct TakeInputs {
  static constexpr unsigned kThreads = 128;
  struct Shared {};
  struct Own {};
  T* to;
  const float* from;
  RowNumbers numbers[2];
  Index count;

  template <typename Block>
  GPU_CODE void operator()(Block& block) const {
    block.each_apart([&](unsigned thread, Own&) {
      const auto task = static_cast<Index>(block.x()) * kThreads + thread;
      for (const auto& some : numbers)
        if (task < some.count) some.to[task] = some.from[task];
      if (task * N >= count) return;
      const auto given = load_pack<N>(from + task * N);
      Pack<T, N> made;
      for (int j = 0; j < N; ++j) made.item[j] = narrow<T>(given.item[j]);
      store_pack<N>(to + task * N, made);
    });
  }
};

}  // namespace

void gather(StreamView on, const View& out, const View& table, std::int64_t lo, const std::int64_t* ids, double multiplier) {
  start_gather(on, out, table, lo, ids, nullptr, multiplier);
}
void gather_rows(StreamView on, const View& out, const View& x, const std::int32_t* rows, const float* weights) {
  start_gather(on, out, x, 0, rows, weights, 1);
}

void take_inputs(StreamView on, const View& to, const View& from, const RowNumbers& ids, const RowNumbers& positions) {
  shard::require(from.type == shard::DType::F32 && from.rows == to.rows && from.columns == to.columns && from.stride == from.columns && to.stride == to.columns,
                 shard::Code::Device, [&] { return fmt::format("device: inputs [{}, {}] into [{}, {}]", from.rows, from.columns, to.rows, to.columns); });
  with_activation_type(to.type, [&]<typename T>(T) {
    const auto run = [&]<int N>() {
      const TakeInputs<T, N> kernel{elements<T>(to), elements<const float>(from), {ids, positions}, to.rows * to.columns};
      const auto tasks = std::max({kernel.count / N, ids.count, positions.count});
      launch(on, {blocks_for(static_cast<std::uint64_t>(tasks), kernel.kThreads)}, kernel);
    };
    constexpr int n = kPack<float>;
    in_packs(from, n) && in_packs(to, n) ? run.template operator()<n>() : run.template operator()<1>();
  });
}

void copy_pieces(StreamView on, std::span<const Piece> pieces) {
  if (pieces.empty()) return;
  shard::require(pieces.size() <= kMaxPieces, shard::Code::Device, [&] { return fmt::format("device: {} pieces in one copy", pieces.size()); });
  const auto& first = pieces[0];
  for (const auto& piece : pieces)
    shard::require(piece.from.type == first.from.type && piece.to.type == first.from.type && piece.from.rows == first.from.rows &&
                       piece.to.rows == first.from.rows && piece.from.columns == piece.to.columns,
                   shard::Code::Device, [] { return "device: pieces of different types or shapes in one copy"; });
  with_activation_type(first.from.type, [&]<typename T>(T) {
    const auto run = [&]<int N>() {
      CopyPieces<T, N> kernel{{}, first.from.rows, std::min<Index>(first.from.rows, 65535)};
      Index most = 0;
      for (std::size_t i = 0; i < pieces.size(); ++i) {
        const auto& piece = pieces[i];
        kernel.pieces[i] = {elements<const T>(piece.from),
                            elements<T>(piece.to),
                            piece.from.stride,
                            piece.to.stride,
                            piece.heads,
                            piece.from.columns,
                            piece.from_step,
                            piece.to_step};
        most = std::max(most, piece.heads * piece.from.columns);
      }
      launch(on, {blocks_for(static_cast<std::uint64_t>(most), kernel.kThreads * N), static_cast<std::uint64_t>(kernel.row_step), pieces.size()},
             kernel);
    };
    constexpr int n = kPack<T>;
    const bool packs = std::all_of(pieces.begin(), pieces.end(), [](const Piece& piece) {
      return in_packs(piece.from, n) && in_packs(piece.to, n) && piece.from_step % n == 0 && piece.to_step % n == 0;
    });
    packs ? run.template operator()<n>() : run.template operator()<1>();
  });
}

}  // namespace gpu
