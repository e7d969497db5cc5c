// Parallel layouts: which rank holds which layers. Integers only; refuses layouts that no Megatron run could have.
#pragma once

#include "libshard/box.h"

#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace shard {

/// The sizes a Megatron run was started with; names as its arguments.
struct Parallel {
  Index tp = 1, pp = 1, vpp = 1, ep = 1, etp = 1;
  std::optional<Index> first_stage_layers, last_stage_layers;  ///< decoder_{first,last}_pipeline_num_layers
  bool account_for_embedding = false, account_for_loss = false;
  std::string pp_layout;  ///< pipeline_model_parallel_layout, e.g. "Et*3|(tt|)*2,m|L"
  bool operator==(const Parallel&) const = default;
};

/// Pipeline stage and virtual chunk.
struct Chunk {
  Index stage = 0, chunk = 0;
  bool operator==(const Chunk&) const = default;
  auto operator<=>(const Chunk&) const = default;
};

/// Which decoder layers each (stage, chunk) holds, in order, and where the ends live.
struct Pipeline {
  Index stages = 1, chunks = 1;
  std::vector<std::vector<Index>> layers;  ///< by chunk * stages + stage
  Chunk embedding, output, mtp, final_norm;
  Index mtp_layers = 0;

  const std::vector<Index>& at(Chunk where) const { return layers[where.chunk * stages + where.stage]; }
  Chunk of_layer(Index layer) const;
};

/// Throws BadLayout with the reason where the layers cannot be dealt out that way.
Pipeline place_layers(const Parallel& parallel, Index num_layers, Index mtp_layers = 0);

/// One writing rank of a stage: its tensor rank, expert rank and expert-tensor rank, as Megatron orders ranks.
struct Cell {
  Index tensor = 0, expert = 0, expert_tensor = 0;
  Index rank_in_stage = 0;
  auto operator<=>(const Cell&) const = default;
};

Cell cell_of(const Parallel& parallel, Index rank_in_stage);
/// The distinct (tensor, expert) cells of one pipeline stage, by ascending rank. Throws BadLayout where two expert
/// tensor ranks would write one legacy file (etp > tp).
std::vector<Cell> cells(const Parallel& parallel);
/// Ranks of one pipeline stage (tensor × data): the least that holds every cell.
Index ranks_per_stage(const Parallel& parallel);

/// ceil(vocab / (multiple × tp)) × multiple × tp.
Index padded_vocab(Index vocab, Index multiple, Index tp);

/// The part of a dimension that rank `rank` of `ways` holds: one box side per fused piece ([gate|up] has two).
struct Cut {
  Index lo, size;
};
std::vector<Cut> cut(Index size, Index pieces, Index ways, Index rank);

}  // namespace shard
