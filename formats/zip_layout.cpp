// Laying out a new torch zip archive: every byte that is no payload. Stored members only, sizes and CRCs in
// the local headers, zip64 fields only where a number needs them.
#include <algorithm>

#include "formats/zip.h"
#include "libshard/error.h"

namespace formats {
namespace {

constexpr std::uint64_t kMost32 = 0xFFFFFFFF;  // marks an overflow itself
constexpr std::uint64_t kAlignment = 64;
constexpr std::uint64_t kUtf8Names = 0x0800;
constexpr std::uint64_t kNoDate = 0x0021;  // 1 January 1980, the first legal day

void put(std::string& to, std::uint64_t value, int bytes) {
  for (int i = 0; i < bytes; ++i) to += static_cast<char>(value >> (8 * i));
}

std::uint64_t clipped(std::uint64_t value) { return std::min(value, kMost32); }
bool overflows(std::uint64_t value) { return value >= kMost32; }

/// The field in front of the padding; the local one has room for sizes only.
std::uint64_t local_zip64_bytes(std::uint64_t size) { return overflows(size) ? 20 : 0; }
std::uint64_t central_zip64_bytes(std::uint64_t size, std::uint64_t header) {
  const std::uint64_t fields = (overflows(size) ? 16 : 0) + (overflows(header) ? 8 : 0);
  return fields ? 4 + fields : 0;
}

}  // namespace

ZipLayout::ZipLayout(std::string root, std::vector<std::pair<std::string, std::uint64_t>> entries)
    : root_(std::move(root)), entries_(std::move(entries)) {
  places_.reserve(entries_.size());
  std::uint64_t at = 0;
  for (const auto& [name, size] : entries_) {
    const std::size_t path = root_.size() + 1 + name.size();
    shard::require(path < 0x8000, shard::Code::BadFormat,
                   [] { return "zip archive: a member name is too long"; });
    const std::uint64_t unpadded = at + 30 + path + local_zip64_bytes(size) + 4;
    const std::uint64_t data = (unpadded + kAlignment - 1) / kAlignment * kAlignment;
    places_.push_back({at, data});
    at = data + size;
  }
  directory_at_ = at;
  size_ = directory_at_ + directory_bytes() + 56 + 20 + 22;
}

std::uint64_t ZipLayout::directory_bytes() const {
  std::uint64_t bytes = 0;
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    bytes += 46 + root_.size() + 1 + entries_[i].first.size() +
             central_zip64_bytes(entries_[i].second, places_[i].header);
  }
  return bytes;
}

std::string ZipLayout::local_header(std::size_t entry, std::uint32_t crc) const {
  const auto& [name, size] = entries_[entry];
  const auto [header, data] = places_[entry];
  const std::uint64_t path = root_.size() + 1 + name.size();
  const std::uint64_t extra = data - header - 30 - path;
  std::string out;
  out.reserve(data - header);
  put(out, 0x04034b50, 4);
  put(out, overflows(size) ? 45 : 20, 2);
  put(out, kUtf8Names, 2);
  put(out, 0, 2);
  put(out, kNoDate << 16, 4);
  put(out, crc, 4);
  put(out, clipped(size), 4);
  put(out, clipped(size), 4);
  put(out, path, 2);
  put(out, extra, 2);
  ((out += root_) += '/') += name;
  if (overflows(size)) {
    put(out, 0x0001, 2);
    put(out, 16, 2);
    put(out, size, 8);
    put(out, size, 8);
  }
  out += "FB";
  const std::uint64_t padding = data - header - out.size() - 2;
  put(out, padding, 2);
  out.append(padding, 'Z');
  return out;
}

void ZipLayout::central_header(std::size_t entry, std::uint32_t crc, std::string& to) const {
  const auto& [name, size] = entries_[entry];
  const std::uint64_t header = places_[entry].header;
  const std::uint64_t extra = central_zip64_bytes(size, header);
  put(to, 0x02014b50, 4);
  put(to, extra ? 45 : 20, 2);
  put(to, extra ? 45 : 20, 2);
  put(to, kUtf8Names, 2);
  put(to, 0, 2);
  put(to, kNoDate << 16, 4);
  put(to, crc, 4);
  put(to, clipped(size), 4);
  put(to, clipped(size), 4);
  put(to, root_.size() + 1 + name.size(), 2);
  put(to, extra, 2);
  to.append(10, '\0');  // comment, disk, attributes
  put(to, clipped(header), 4);
  ((to += root_) += '/') += name;
  if (!extra) return;
  put(to, 0x0001, 2);
  put(to, extra - 4, 2);
  if (overflows(size)) put(to, size, 8), put(to, size, 8);
  if (overflows(header)) put(to, header, 8);
}

std::string ZipLayout::directory(std::span<const std::uint32_t> crcs) const {
  std::string out;
  out.reserve(size_ - directory_at_);
  for (std::size_t i = 0; i < entries_.size(); ++i) central_header(i, crcs[i], out);
  const std::uint64_t bytes = out.size(), end64 = directory_at_ + bytes, count = entries_.size();
  put(out, 0x06064b50, 4);
  put(out, 44, 8);
  put(out, 0x031E, 2);
  put(out, 45, 2);
  put(out, 0, 8);
  for (const std::uint64_t value : {count, count, bytes, directory_at_}) put(out, value, 8);
  put(out, 0x07064b50, 4);
  put(out, 0, 4);
  put(out, end64, 8);
  put(out, 1, 4);
  put(out, 0x06054b50, 4);
  put(out, 0, 4);
  put(out, std::min<std::uint64_t>(count, 0xFFFF), 2);
  put(out, std::min<std::uint64_t>(count, 0xFFFF), 2);
  put(out, clipped(bytes), 4);
  put(out, clipped(directory_at_), 4);
  put(out, 0, 2);
  return out;
}

std::vector<std::pair<std::uint64_t, std::string>> ZipLayout::frame(
    std::span<const std::uint32_t> crcs) const {
  shard::require(crcs.size() == entries_.size(), shard::Code::Usage, [&] {
    return fmt::format("zip archive: {} CRCs for {} members", crcs.size(), entries_.size());
  });
  std::vector<std::pair<std::uint64_t, std::string>> parts;
  parts.reserve(entries_.size() + 1);
  for (std::size_t i = 0; i < entries_.size(); ++i)
    parts.emplace_back(places_[i].header, local_header(i, crcs[i]));
  parts.emplace_back(directory_at_, directory(crcs));
  return parts;
}

}  // namespace formats
