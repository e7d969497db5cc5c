// Writing by range, and closing archives once their sums are known.
#include "formats/local_writer.h"

#include "formats/kernels.h"
#include "libshard/error.h"

namespace formats {
namespace {

constexpr std::size_t kMostOpen = 256;

std::span<const std::byte> bytes_of(std::string_view text) { return std::as_bytes(std::span(text.data(), text.size())); }

}  // namespace

std::uint32_t OutputFolder::add(const std::string& name) {
  const std::lock_guard lock(mutex_);
  const auto path = root_ / name;
  std::error_code error;
  std::filesystem::create_directories(path.parent_path(), error);
  shard::require(!error, shard::Code::Io, [&] { return fmt::format("{}: {}", path.parent_path().string(), error.message()); });
  names_.push_back(name);
  open_.emplace_back();
  return static_cast<std::uint32_t>(names_.size() - 1);
}

std::shared_ptr<OutFile> OutputFolder::open(std::uint32_t file) const {
  const std::lock_guard lock(mutex_);
  if (open_[file]) return open_[file];
  if (order_.size() >= kMostOpen) {
    for (std::size_t i = 0; i < kMostOpen / 2; ++i) open_[order_[i]].reset();
    order_.erase(order_.begin(), order_.begin() + kMostOpen / 2);
  }
  order_.push_back(file);
  return open_[file] = std::make_shared<OutFile>(root_ / names_[file]);
}

void OutputFolder::write(std::uint32_t file, std::uint64_t offset, std::span<const std::byte> from) {
  open(file)->write(offset, from);
}

void OutputFolder::write(std::uint32_t file, std::uint64_t offset, std::string_view from) {
  write(file, offset, bytes_of(from));
}

void OutputFolder::read(std::uint32_t file, std::uint64_t offset, std::span<std::byte> into) const {
  File(root_ / names_[file]).read(offset, into);
}

void OutputFolder::resize(std::uint32_t file, std::uint64_t size) { open(file)->resize(size); }

shard::FileRange OutputFolder::range(std::uint32_t file, std::uint64_t offset) {
  const auto out = open(file);
  return {out->descriptor(), offset, out};
}

void OutputFolder::flush(bool sync) {
  for (std::uint32_t file = 0; sync && file < names_.size(); ++file) open(file)->sync();
  open_.assign(names_.size(), nullptr);
  order_.clear();
}

void OutputFolder::commit(bool sync) {
  open_.clear();
  if (publication_) publication_->commit(sync);
}

std::uint32_t LocalWriter::add_stream(std::uint32_t file, std::uint64_t offset, std::uint64_t size, bool summed) {
  described_.streams.push_back({file, offset, size, std::nullopt, summed});
  return static_cast<std::uint32_t>(described_.streams.size() - 1);
}

std::uint32_t LocalWriter::add_stream(std::shared_ptr<StreamSink> sink, std::uint64_t size) {
  const auto stream = add_stream(0, 0, size, false);
  sinks_[stream] = std::move(sink);
  return stream;
}

LocalWriter::Added LocalWriter::add_archive(std::uint32_t file, std::uint64_t base, std::string root, std::string_view pickle,
                                            std::span<const std::uint64_t> storages) {
  auto layout = torch_layout(std::move(root), pickle, storages);
  Archive archive{file, base, static_cast<std::uint32_t>(described_.streams.size()), {}, layout.first_storage, storages.size(), std::move(layout.zip)};
  archive.small_crcs.resize(archive.zip.entries());
  for (const auto& record : layout.small) {
    folder_.write(file, base + archive.zip.data_offset(record.entry), record.bytes);
    archive.small_crcs[record.entry] = kernels().crc32(bytes_of(record.bytes));
  }
  for (std::size_t i = 0; i < storages.size(); ++i)
    add_stream(file, base + archive.zip.data_offset(archive.first_storage + i), storages[i], true);
  const Added added{archive.zip.size(), archive.first_stream};
  archives_.push_back(std::move(archive));
  return added;
}

void LocalWriter::write(std::uint32_t stream, std::uint64_t offset, std::span<const std::byte> from) {
  if (const auto sink = sinks_.find(stream); sink != sinks_.end()) return sink->second->write(offset, from);
  const auto& range = described_.streams[stream];
  folder_.write(range.file, range.offset + offset, from);
}

void LocalWriter::read(std::uint32_t stream, std::uint64_t offset, std::span<std::byte> into) const {
  const auto& range = described_.streams[stream];
  folder_.read(range.file, range.offset + offset, into);
}

std::optional<shard::FileRange> LocalWriter::file_range(std::uint32_t stream) {
  if (sinks_.contains(stream)) return std::nullopt;
  const auto& range = described_.streams[stream];
  return folder_.range(range.file, range.offset);
}

void LocalWriter::commit(std::span<const std::optional<std::uint32_t>> crc32, bool sync) {
  if (finish_) finish_();
  for (const auto& archive : archives_) {
    auto crcs = archive.small_crcs;
    for (std::size_t i = 0; i < archive.storages; ++i) crcs[archive.first_storage + i] = crc32[archive.first_stream + i].value();
    for (const auto& [offset, bytes] : archive.zip.frame(crcs)) folder_.write(archive.file, archive.base + offset, bytes);
  }
  folder_.commit(sync);
}

}  // namespace formats
