// Reading the container of torch.save before 1.6, pickle by pickle. Never reads a storage, only where it
// lies.
#include "formats/torch_legacy.h"

#include <algorithm>
#include <cstring>
#include <map>

#include "formats/torch_storage.h"
#include "libshard/error.h"

namespace formats {
namespace {

using pickle::Graph;
using pickle::Kind;
using pickle::Ref;
using shard::Code;

constexpr std::uint64_t kFirstWindow = 64 << 10;
constexpr std::uint64_t kLargestPickle = std::uint64_t{1} << 30;
constexpr std::int64_t kProtocol = 1001;

template <typename... Args>
[[noreturn]] void refuse(fmt::format_string<Args...> format, Args&&... args) {
  throw shard::Error(Code::BadFormat,
                     "old torch stream: " + fmt::format(format, std::forward<Args>(args)...));
}

/// The pickle at `at`, which moves behind it. Its length is not known before, so the window grows.
Graph take_pickle(Windows& part, std::uint64_t& at) {
  const std::uint64_t left = part.length() - at;
  for (std::uint64_t window = kFirstWindow;; window *= 4) {
    const std::uint64_t bytes = std::min({window, left, kLargestPickle});
    if (auto found = pickle::parse_prefix(part.at(at, bytes))) {
      at += found->bytes;
      return std::move(found->graph);
    }
    if (bytes == left) refuse("ends within a pickle; truncated?");
    if (bytes == kLargestPickle) refuse("a pickle of more than {} bytes", kLargestPickle);
  }
}

void take_header(Windows& part, std::uint64_t& at) {
  const Graph magic = take_pickle(part, at);
  if (magic.kind(magic.root) != Kind::BigInt || magic.text(magic.root) != pickle::kTorchMagic) {
    shard::fail(Code::BadFormat, "a pickle, but no torch.save file");
  }
  const Graph protocol = take_pickle(part, at);
  if (protocol.integer(protocol.root) != kProtocol) {
    refuse("protocol {}; {} is known", protocol.integer(protocol.root), kProtocol);
  }
  const Graph system = take_pickle(part, at);
  const auto little = system.find(system.root, "little_endian");
  if (!little || !system.boolean(*little)) refuse("only little-endian data is supported");
}

std::map<std::string_view, StorageId> named_storages(const Graph& graph) {
  std::map<std::string_view, StorageId> named;
  for (Ref ref = 0; ref < graph.size(); ++ref) {
    const auto storage = storage_of(graph, ref);
    if (!storage) continue;
    const auto [known, added] = named.emplace(storage->key, *storage);
    if (!added && known->second.bytes != storage->bytes) refuse("storage '{}' has two sizes", storage->key);
  }
  return named;
}

/// The record of one storage: its element count, then its bytes.
ZipRecord take_storage(Windows& part, std::uint64_t& at, const StorageId& storage) {
  std::uint64_t elements = 0;
  std::memcpy(&elements, part.at(at, 8).data(), 8);
  at += 8;
  if (elements != storage.bytes / storage.element_bytes) {
    refuse("storage '{}' has {} elements; the pickle says {}", storage.key, elements,
           storage.bytes / storage.element_bytes);
  }
  if (storage.bytes > part.length() - at) refuse("storage '{}' goes beyond the end; truncated?", storage.key);
  ZipRecord record{fmt::format("data/{}", storage.key), part.begin() + at, storage.bytes, 0};
  at += storage.bytes;
  return record;
}

}  // namespace

TorchFile read_legacy(Windows& part) {
  std::uint64_t at = 0;
  take_header(part, at);
  TorchFile file{{}, take_pickle(part, at)};
  const Graph keys = take_pickle(part, at);
  auto named = named_storages(file.graph);
  for (const Ref key : keys.items(keys.root)) {
    const auto found = named.find(keys.text(key));
    if (found == named.end())
      refuse("storage '{}' is not in the pickle, or twice in the list", keys.text(key));
    file.zip.records.push_back(take_storage(part, at, found->second));
    named.erase(found);
  }
  if (!named.empty()) refuse("storage '{}' is missing", named.begin()->first);
  if (at != part.length()) refuse("{} bytes after its end", part.length() - at);
  std::sort(file.zip.records.begin(), file.zip.records.end(),
            [](const ZipRecord& a, const ZipRecord& b) { return a.name < b.name; });
  return file;
}

}  // namespace formats
