// Reading streams from files, few of which are open at a time.
#include "formats/local.h"

#include "libshard/error.h"

#include <algorithm>

namespace formats {
namespace {

constexpr std::size_t kMostOpen = 512;
constexpr std::uint64_t kCompareBlock = 1 << 20;

void refuse(bool changed, const std::string& name) {
  shard::require(!changed, shard::Code::Io, [&] { return fmt::format("{}: was written to or replaced while it was read", name); });
}

/// `read`: fills the blocks of both sides at an offset.
template <typename Read>
bool same_blocks(std::uint64_t bytes, const Read& read) {
  std::vector<std::byte> left(std::min(kCompareBlock, bytes)), right(left.size());
  for (std::uint64_t at = 0; at < bytes; at += kCompareBlock) {
    const auto size = std::min(kCompareBlock, bytes - at);
    read(at, std::span(left).first(size), std::span(right).first(size));
    if (!std::equal(left.begin(), left.begin() + static_cast<std::ptrdiff_t>(size), right.begin())) return false;
  }
  return true;
}

}  // namespace

FilePool::FilePool(std::vector<std::filesystem::path> paths) : open_(paths.size()), paths_(std::move(paths)) {
  for (const auto& path : paths_) facts_.push_back(facts_of(path));
}

std::shared_ptr<const File> FilePool::get(std::uint32_t file) const {
  const std::lock_guard lock(mutex_);
  if (open_[file]) return open_[file];
  if (order_.size() >= kMostOpen) {
    const auto oldest = std::span(order_).first(kMostOpen / 2);
    for (const auto i : oldest) refuse(open_[i]->changed(), open_[i]->name());  // before any is closed: other threads go on with the pool
    for (const auto i : oldest) open_[i].reset();
    order_.erase(order_.begin(), order_.begin() + kMostOpen / 2);
  }
  auto opened = std::make_shared<const File>(paths_[file]);
  refuse(facts_[file] && opened->facts() != *facts_[file], opened->name());
  order_.push_back(file);
  return open_[file] = std::move(opened);
}

std::uint32_t FilePool::add(std::shared_ptr<const File> file) {
  const std::lock_guard lock(mutex_);
  paths_.emplace_back();
  facts_.emplace_back();
  open_.push_back(std::move(file));
  return static_cast<std::uint32_t>(open_.size() - 1);
}

std::uint32_t FilePool::add(std::shared_ptr<const ComputedBytes> bytes) {
  const auto index = add(std::shared_ptr<const File>());
  computed_[index] = std::move(bytes);
  return index;
}

const ComputedBytes* FilePool::computed(std::uint32_t file) const {
  const auto found = computed_.find(file);
  return found == computed_.end() ? nullptr : found->second.get();
}

void FilePool::refuse_changed() const {
  {
    const std::lock_guard lock(mutex_);
    for (std::size_t i = 0; i < open_.size(); ++i) {
      if (open_[i]) refuse(open_[i]->changed(), open_[i]->name());
      if (i >= facts_.size() || !facts_[i]) continue;
      const auto now = facts_of(paths_[i]);
      refuse(now && *now != *facts_[i], paths_[i].string());  // one that is gone was the same to its end
    }
  }
  for (const auto& other : others_) other->refuse_changed();
}

void LocalReader::read(std::uint32_t stream, std::uint64_t offset, std::span<std::byte> into) const {
  const auto& range = described_.streams[stream];
  shard::require(offset <= range.size && into.size() <= range.size - offset, shard::Code::BadFormat, [&] {
    return fmt::format("{}: bytes {}+{} reach past a stream of {}", described_.files[range.file], offset, into.size(), range.size);
  });
  if (const auto* computed = files_->computed(range.file)) computed->read(range.offset + offset, into);
  else files_->get(range.file)->read(range.offset + offset, into);
}

const shard::ScaledMatrix* LocalReader::scaled_matrix(std::uint32_t stream) const {
  const auto* const computed = files_->computed(described_.streams.at(stream).file);
  return computed ? computed->scaled_matrix() : nullptr;
}

std::optional<shard::FileRange> LocalReader::file_range(std::uint32_t stream) const {
  const auto& range = described_.streams[stream];
  if (files_->computed(range.file)) return std::nullopt;
  const auto file = files_->get(range.file);
  return shard::FileRange{file->descriptor(), range.offset, file};
}

bool same_bytes(const shard::Reader& reader, const shard::Place& a, const shard::Place& b, std::uint64_t bytes) {
  return same_blocks(bytes, [&](std::uint64_t at, auto left, auto right) {
    reader.read(a.stream, a.offset + at, left);
    reader.read(b.stream, b.offset + at, right);
  });
}

bool same_bytes(const FilePool& files, const FileOffset& a, const FileOffset& b, std::uint64_t bytes) {
  return same_blocks(bytes, [&](std::uint64_t at, auto left, auto right) {
    files.get(a.file)->read(a.offset + at, left);
    files.get(b.file)->read(b.offset + at, right);
  });
}

}  // namespace formats
