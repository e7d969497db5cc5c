// Leaves of the size that tensors are digested by, so that one read size serves both.
#include "formats/file_digest.h"

#include "formats/file.h"
#include "formats/hash.h"
#include "libshard/error.h"
#include "libshard/parallel.h"
#include "libshard/stop.h"

#include <algorithm>

namespace formats {
namespace {

constexpr std::uint64_t kLeaf = 256 << 10;  // part of the digest's definition

}  // namespace

FileDigest digest_file(const std::filesystem::path& path, const shard::Budget& budget) {
  const File file(path);
  std::vector<shard::Digest> leaves(static_cast<std::size_t>((file.size() + kLeaf - 1) / kLeaf));
  std::vector<std::vector<std::byte>> buffers(std::max(1u, budget.threads));
  shard::run_tasks(leaves.size(), budget.threads, [&](std::size_t i, unsigned worker) {
    shard::refuse_stopped(budget.stop);
    auto& buffer = buffers[worker];
    buffer.resize(static_cast<std::size_t>(std::min(kLeaf, file.size() - i * kLeaf)));
    file.read(i * kLeaf, buffer);
    leaves[i] = hash_bytes(buffer);
  });
  return {file.size(), hash_bytes(std::as_bytes(std::span(leaves)))};
}

}  // namespace formats
