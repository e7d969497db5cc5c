// Turning DCP items into streams and shards: opens each item's small archive, never its payload.
#pragma once

#include "formats/checkpoint.h"
#include "formats/torch_dcp/metadata.h"
#include "formats/torch_save.h"

namespace formats::torch_dcp {

/// Fills files, stored tensors and findings of `checkpoint` from its folder. With options.places off a stream is a whole
/// item and nothing but `.metadata` is read.
Metadata read_stored(Checkpoint& checkpoint, const OpenOptions& options);

/// A plain checkpoint: every key its own logical tensor, bytes items as objects.
Checkpoint open_plain(const std::filesystem::path& folder, const OpenOptions& options);

/// Reads an item that is no tensor and compares the sums of its archive: a "checksum" finding where it is not what torch.save wrote.
std::optional<shard::Finding> check_object(const Checkpoint& checkpoint, const shard::ShardedObject& object);

/// What a bytes item holds, as torch.save wrote it.
TorchFile open_item(const Checkpoint& checkpoint, const Item& item);

}  // namespace formats::torch_dcp
