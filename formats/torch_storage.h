// The persistent ids of torch.save: which storage a pickle names, and how large it has to be. Knows no
// containers.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

#include "formats/pickle.h"
#include "libshard/dtype.h"

namespace formats {

struct StorageId {
  std::string_view key;
  std::optional<shard::DType> dtype;  ///< none: untyped or quantised
  bool quantised;
  std::uint64_t element_bytes;
  std::uint64_t bytes;       ///< of the whole storage
  std::uint64_t view_begin;  ///< the part that is meant, in bytes; old streams cut storages into views
  std::uint64_t view_bytes;
};

/// Of a persistent id ('storage', class, key, location, elements[, view]); nullopt for any other node.
std::optional<StorageId> storage_of(const pickle::Graph& graph, pickle::Ref ref);

/// "FloatStorage"; "" for dtypes whose storages are untyped.
std::string_view storage_class(shard::DType dtype);

}  // namespace formats
