// The `.metadata` of a torch.distributed.checkpoint folder: which item of which file holds which box. Never opens a data
// file; refuses boxes without an item, items without a box, and paths that leave the folder.
#pragma once

#include "formats/file.h"
#include "formats/pickle.h"
#include "libshard/box.h"
#include "libshard/dtype.h"

#include <filesystem>
#include <map>
#include <memory>
#include <string>
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
struct Metadata {
  std::vector<std::string> files;
  std::map<std::string, Tensor> tensors;
  std::map<std::string, Item> bytes;
  std::map<std::string, shard::Shape> flattened;  ///< Megatron before 0.16: original shape of flattened optimizer tensors
};

/// Reads and checks `folder/.metadata`. Throws NotFound, BadFormat.
Metadata read_metadata(const std::filesystem::path& folder);

/// The pickle to write: protocol 4, no clock, no path. `nested`: planner_data for plain checkpoints.
std::string write_metadata(const Metadata& metadata, bool nested);

}  // namespace formats::torch_dcp
