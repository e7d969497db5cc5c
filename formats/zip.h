// The directory of a torch zip archive, both ways: which bytes of a file hold which record. Never reads a
// payload; refuses compressed members, unsafe or doubled names, overlaps and members outside the archive.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "formats/file.h"

namespace formats {

struct ZipRecord {
  std::string name;      ///< below the root
  std::uint64_t offset;  ///< of its data, in the file
  std::uint64_t size;
  std::uint32_t crc32;
};

struct ZipDirectory {
  std::string root;
  std::vector<ZipRecord> records;  ///< by name
  bool crcs_recorded = false;      ///< some writers leave every CRC zero
  const ZipRecord* find(std::string_view name) const;
};

/// A part of a file seen through two buffers, its end and a place that moves, so that a small archive costs
/// one read and a big one few.
class Windows {
 public:
  Windows(const File& file, std::uint64_t begin, std::uint64_t length);
  std::uint64_t begin() const { return begin_; }
  std::uint64_t length() const { return length_; }
  const File& file() const { return file_; }
  /// The last `bytes` (or all), valid until the next call of tail().
  std::span<const std::byte> tail(std::uint64_t bytes);
  /// [offset, offset + length) from the begin of the part, valid until the next call. BadFormat outside the
  /// part.
  std::span<const std::byte> at(std::uint64_t offset, std::uint64_t length);

 private:
  const File& file_;
  std::uint64_t begin_, length_;
  std::uint64_t tail_at_, place_at_ = 0;
  std::vector<std::byte> tail_, place_;
};

/// The archive that fills `part`.
ZipDirectory read_zip(Windows& part);
ZipDirectory read_zip(const File& file, std::uint64_t begin, std::uint64_t length);

/// Where everything of a new archive goes. Payloads start at multiples of 64 from the archive's start.
class ZipLayout {
 public:
  /// `entries`: name below the root, payload bytes.
  ZipLayout(std::string root, std::vector<std::pair<std::string, std::uint64_t>> entries);
  std::uint64_t size() const { return size_; }
  std::size_t entries() const { return entries_.size(); }
  std::uint64_t data_offset(std::size_t entry) const { return places_[entry].data; }
  std::uint64_t data_size(std::size_t entry) const { return entries_[entry].second; }
  /// Every byte that is no payload, as (offset, bytes) in ascending order. `crcs`: of the payloads.
  std::vector<std::pair<std::uint64_t, std::string>> frame(std::span<const std::uint32_t> crcs) const;

 private:
  struct Place {
    std::uint64_t header, data;
  };
  std::string local_header(std::size_t entry, std::uint32_t crc) const;
  void central_header(std::size_t entry, std::uint32_t crc, std::string& to) const;
  std::string directory(std::span<const std::uint32_t> crcs) const;
  std::uint64_t directory_bytes() const;

  std::string root_;
  std::vector<std::pair<std::string, std::uint64_t>> entries_;
  std::vector<Place> places_;
  std::uint64_t directory_at_ = 0, size_ = 0;
};

}  // namespace formats
