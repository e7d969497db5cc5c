// Describing a checkpoint that does not exist yet, in every format that can be written.
#pragma once

#include "formats/checkpoint.h"
#include "formats/local_writer.h"
#include "libshard/translate.h"

#include <memory>

namespace formats {

struct TargetOptions {
  std::string format;                       ///< "torch_dist", "mp_rank", "dcp", "hf"
  shard::Parallel parallel;
  std::optional<shard::DType> dtype;        ///< cast floating tensors to this
  std::uint64_t max_shard_size = 1'000'000'000;
  bool keep_spelling = false;               ///< reshard: the source's keys
  bool force = false;
  bool joint = false;                       ///< `path` is a folder that several processes write together
};

struct Target {
  std::unique_ptr<LocalWriter> writer;      ///< describes the stored tensors with their streams
  shard::ShardedStateDict logical;          ///< what make_plan joins with the source's
  std::vector<Dropped> dropped;
  std::vector<std::string> carried;
  shard::Index padded_vocab = 0;
  std::vector<std::string> notes;
  std::shared_ptr<const Checkpoint> source; ///< the source with what the target needs beside it; null: as it was given
};

/// Lays out `path` for everything that `source` holds. Files are created in a staging folder; nothing is moved yet.
/// Throws BadLayout where the model cannot be cut so, Mismatch where something has no place.
Target create(const std::filesystem::path& path, const Checkpoint& source, const TargetOptions& options);

/// The writer that the options ask for.
std::unique_ptr<LocalWriter> make_writer(const std::filesystem::path& path, const TargetOptions& options);

}  // namespace formats
