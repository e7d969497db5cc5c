// What a checkpoint holds, as maps from boxes of tensors to byte runs in streams. Values only; nothing is read here.
#pragma once

#include "libshard/box.h"
#include "libshard/dtype.h"

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace shard {

/// A byte space that a format can address: so far always a range of a local file (a zip payload, a data section).
struct Stream {
  std::uint32_t file = 0;               ///< index into ShardedStateDict::files
  std::uint64_t offset = 0, size = 0;   ///< bytes within the file
  std::optional<std::uint32_t> crc32;   ///< what the source recorded over the whole stream
  bool summed = false;                  ///< a target that must record a CRC-32 over the whole stream
};

/// Where an element lies: stream, byte offset of the box's first element, bytes per step in each dimension.
struct Place {
  std::uint32_t stream = 0;
  std::uint64_t offset = 0;
  Shape stride;
};

/// As Megatron counts copies: {pipeline copy, tensor rank, data rank}; the main one is all zeros.
using ReplicaId = std::array<int, 3>;

struct Shard {
  Box box;
  Place place;
  ReplicaId replica_id{};
};

struct ShardedTensor {
  std::string key;
  DType dtype = DType::F32;
  Shape global_shape;           ///< with the dimensions that fusion hides, where a family knows them
  Shape natural;                ///< the shape people know; the same elements in the same order
  std::vector<Shard> shards;
  bool vocabulary = false;      ///< rows (dimension 0) are padded vocabulary: sizes may differ between layouts
};

/// A pickled or otherwise opaque item that is carried, transformed or named as dropped; never lost in silence.
struct ShardedObject {
  std::string key;
  std::string kind;             ///< "extra_state", "args", "rng", "bytes" …
  std::uint64_t bytes = 0;
  std::uint32_t file = 0;
  std::uint64_t offset = 0;     ///< in the file
};

struct ShardedStateDict {
  std::vector<std::string> files;  ///< names below the checkpoint's folder
  std::vector<Stream> streams;
  std::map<std::string, ShardedTensor, std::less<>> tensors;
  std::vector<ShardedObject> objects;
  std::map<std::string, std::string, std::less<>> ties;  ///< alias -> owner

  /// The tensor of that name or alias; throws NotFound.
  const ShardedTensor& at(std::string_view name) const;
};

/// One thing that is wrong, or worth knowing, about a checkpoint. `rule` is one of the documented names.
struct Finding {
  enum class Severity { Error, Warning, Note };
  std::string rule;
  Severity severity = Severity::Error;
  std::string key;
  std::string message;
};

std::string_view name(Finding::Severity severity);
/// Throws the first error among `findings` (4 where a file contradicts itself, 6 where parts contradict each other).
void refuse(const std::vector<Finding>& findings);

/// Holes and overlaps of boxes that should tile [0, shape) exactly; equal boxes count as replicas, not as overlap.
/// At most `most` findings are added.
void check_cover(const ShardedTensor& tensor, std::vector<Finding>& findings, std::size_t most = 4);

}  // namespace shard
