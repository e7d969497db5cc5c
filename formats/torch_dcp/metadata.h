// The `.metadata` of a torch.distributed.checkpoint folder: which item of which file holds which box. Never opens a data
// file; refuses boxes without an item and paths that leave the folder, finds items without a box or on the bytes of another.
#pragma once

#include "formats/file.h"
#include "formats/pickle.h"
#include "libshard/box.h"
#include "libshard/dtype.h"
#include "libshard/state_dict.h"

#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <variant>
#include <vector>

namespace formats::torch_dcp {

struct Item {
  std::uint32_t file = 0;
  std::uint64_t offset = 0, length = 0;
  bool zstd = false;
};
struct Chunk {
  shard::Box box;
  Item item;
};
struct Tensor {
  shard::DType dtype;
  shard::Shape shape;
  std::vector<Chunk> chunks;
};
using Path = std::vector<std::variant<std::string, std::int64_t>>;  ///< keys of dicts, places in lists
struct Metadata {
  std::vector<std::string> files;
  std::map<std::string, Tensor> tensors;
  std::map<std::string, Item> bytes;
  std::vector<std::pair<std::string, Item>> copies;  ///< of bytes items, where every rank wrote its own
  std::map<std::string, Path> nesting;  ///< planner_data: where a key stands in the state dict that was saved
  std::vector<shard::Finding> findings;
  std::map<std::string, shard::Shape> flattened;  ///< Megatron before 0.16: original shape of flattened optimizer tensors
};

/// `.metadata`, or the `__0.metadata` … that ranks write for themselves (use_collectives=False).
bool has_metadata(const std::filesystem::path& folder);

/// Reads and checks it, or all ranks' together. Throws NotFound, BadFormat; Mismatch where ranks disagree on a tensor.
Metadata read_metadata(const std::filesystem::path& folder);

/// The pickle to write: protocol 4, no clock, no path.
std::string write_metadata(const Metadata& metadata);

}  // namespace formats::torch_dcp
