// Files of torch.save, both ways: which tensors a pickle describes and which bytes of the file hold them.
// Reads the zip container and the older stream; refuses TorchScript, tar files, big-endian data and tensors
// beyond their storage.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "formats/file.h"
#include "formats/pickle.h"
#include "formats/zip.h"
#include "libshard/box.h"
#include "libshard/dtype.h"
#include "libshard/state_dict.h"

namespace formats {

struct StoredTensor {
  shard::DType dtype;
  std::string storage;          ///< key; its bytes are the record "data/KEY"
  std::uint64_t storage_bytes;  ///< of the whole storage
  std::uint64_t offset;         ///< bytes into the storage
  shard::Shape sizes, strides;  ///< in elements
};

/// The tensor that a node stands for, within the bounds of its storage; nullopt where it is no tensor.
/// BadFormat, naming the function, for kinds of tensor that are not plain memory (sparse, quantised,
/// subclasses …).
std::optional<StoredTensor> tensor_of(const pickle::Graph& graph, pickle::Ref ref);
/// Of a symbol such as torch.bfloat16; nullopt for any other node and for a dtype that is not supported.
std::optional<shard::DType> dtype_of(const pickle::Graph& graph, pickle::Ref ref);
/// Of a tuple, list or torch.Size of integers; nullopt for any other node.
std::optional<shard::Shape> shape_of(const pickle::Graph& graph, pickle::Ref ref);

struct TorchFile {
  ZipDirectory zip;  ///< of an old stream: the storages under the same names, no root
  pickle::Graph graph;
};
/// The torch.save file that is `length` bytes of `file` from `begin`; knows the container by its first bytes.
/// Checks that every storage which the pickle names is there in full.
TorchFile open_torch(const File& file, std::uint64_t begin, std::uint64_t length);
TorchFile open_torch(const File& file);
/// The records of a file whose CRC-32 it keeps, as streams of `name`.
shard::ShardedStateDict summed_records(const std::filesystem::path& path, const std::string& name);

/// Reads a record whole: what is wrong with its sum, "" where it is right or none is recorded.
std::string wrong_sum(const File& file, const ZipDirectory& zip, const ZipRecord& record);

/// Adds torch.<dtype>.
pickle::Ref dtype_node(pickle::Graph& graph, shard::DType dtype);
/// Adds torch.Size(sizes).
pickle::Ref size_node(pickle::Graph& graph, const shard::Shape& sizes);
/// Adds a contiguous tensor of `sizes` at element `offset` of a storage that holds `storage_elements` (by
/// default just the tensor).
pickle::Ref tensor_node(pickle::Graph& graph, shard::DType dtype, std::string_view storage_key,
                        const shard::Shape& sizes, std::int64_t offset = 0,
                        std::optional<std::int64_t> storage_elements = std::nullopt);

/// A record that is known when the layout is.
struct SmallRecord {
  std::size_t entry;
  std::string bytes;
};
struct TorchLayout {
  ZipLayout zip;
  std::vector<SmallRecord> small;  ///< all entries but the storages
  std::size_t first_storage;       ///< storage i is entry first_storage + i, record "data/i"
};
/// A new archive around one pickle and its storages "0", "1", …
TorchLayout torch_layout(std::string root, std::string_view pickle_bytes,
                         std::span<const std::uint64_t> storage_sizes);

}  // namespace formats
