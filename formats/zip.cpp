// Reading the directory of a torch zip archive. Trusts the central directory only after comparing it with the
// local headers and the bounds of the archive.
#include "formats/zip.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <optional>

#include "libshard/error.h"

namespace formats {
namespace {

using shard::Code;
using Bytes = std::span<const std::byte>;

constexpr std::uint64_t kWholeAtOnce = 16 << 10;  // smaller archives are read in one go
constexpr std::uint64_t kTail = 4 << 10;          // holds the directory of an archive with few records
constexpr std::uint64_t kLongestEnd = 22 + 0xFFFF;
constexpr std::uint64_t kPlace = 4 << 10;
constexpr std::uint64_t kMost32 = 0xFFFFFFFF;

constexpr std::uint32_t kLocalMark = 0x04034b50;
constexpr std::uint32_t kCentralMark = 0x02014b50;
constexpr std::uint32_t kEndMark = 0x06054b50;
constexpr std::uint32_t kEnd64Mark = 0x06064b50;
constexpr std::uint32_t kLocator64Mark = 0x07064b50;

template <typename Number>
Number load(Bytes bytes, std::size_t at) {
  static_assert(std::endian::native == std::endian::little);
  Number value;
  std::memcpy(&value, bytes.data() + at, sizeof value);
  return value;
}
std::uint16_t u16(Bytes bytes, std::size_t at) { return load<std::uint16_t>(bytes, at); }
std::uint32_t u32(Bytes bytes, std::size_t at) { return load<std::uint32_t>(bytes, at); }
std::uint64_t u64(Bytes bytes, std::size_t at) { return load<std::uint64_t>(bytes, at); }

std::string_view chars(Bytes bytes) { return {reinterpret_cast<const char*>(bytes.data()), bytes.size()}; }

bool within(std::uint64_t offset, std::uint64_t length, std::uint64_t all) {
  return offset <= all && length <= all - offset;
}

template <typename... Args>
[[noreturn]] void refuse(fmt::format_string<Args...> format, Args&&... args) {
  throw shard::Error(Code::BadFormat, "zip archive: " + fmt::format(format, std::forward<Args>(args)...));
}

std::string printable(std::string_view name) {
  std::string shown(name.substr(0, 100));
  std::replace_if(
      shown.begin(), shown.end(), [](char c) { return static_cast<unsigned char>(c) < 0x20 || c == 0x7F; },
      '?');
  return shown;
}

/// What the end of the archive says about its directory; offsets from the archive's start.
struct End {
  std::uint64_t records, bytes, at;
  std::uint64_t position;  // where the directory has to end at the latest
};

/// The last end record in `tail`, counted from its start.
std::optional<std::size_t> find_end(Bytes tail) {
  if (tail.size() < 22) return std::nullopt;
  for (std::size_t at = tail.size() - 22 + 1; at-- > 0;) {
    if (u32(tail, at) == kEndMark && u16(tail, at + 20) <= tail.size() - at - 22) return at;
  }
  return std::nullopt;
}

/// The zip64 record, where a locator stands before the classic one: it decides, whatever the other says.
std::optional<End> read_end64(Windows& part, std::uint64_t end) {
  if (end < 20) return std::nullopt;
  const Bytes locator = part.at(end - 20, 20);
  if (u32(locator, 0) != kLocator64Mark) return std::nullopt;
  const std::uint64_t at = u64(locator, 8);
  if (!within(at, 56, end - 20)) refuse("the zip64 end record is at byte {}, outside the archive", at);
  const Bytes record = part.at(at, 56);
  if (u32(record, 0) != kEnd64Mark) refuse("no zip64 end record at byte {}", at);
  if (u64(record, 24) != u64(record, 32) || u32(record, 16) || u32(record, 20)) refuse("spans several disks");
  return End{u64(record, 32), u64(record, 40), u64(record, 48), at};
}

End read_end(Windows& part) {
  Bytes tail = part.tail(part.length() <= kWholeAtOnce ? part.length() : kTail);
  auto found = find_end(tail);
  if (!found && tail.size() < part.length()) {
    tail = part.tail(kLongestEnd);
    found = find_end(tail);
  }
  if (!found) refuse("no central directory at its end; truncated?");
  const Bytes record = tail.subspan(*found, 22);
  const std::uint64_t position = part.length() - tail.size() + *found;
  const End classic{u16(record, 10), u32(record, 12), u32(record, 16), position};
  if (const auto end64 = read_end64(part, position)) return *end64;
  if (u16(record, 4) || u16(record, 6) || u16(record, 8) != u16(record, 10)) refuse("spans several disks");
  return classic;
}

/// One entry of the central directory.
struct Central {
  std::string_view name;  // with the root
  std::uint64_t size, header;
  std::uint32_t crc32;
  std::uint16_t flags;
};

/// Replaces what overflowed by the zip64 extra field, in the order size, stored size, offset.
void apply_zip64(Bytes extra, std::uint64_t& size, std::uint64_t& stored, std::uint64_t& header) {
  while (extra.size() >= 4) {
    const std::size_t length = u16(extra, 2);
    if (length > extra.size() - 4) break;
    if (u16(extra, 0) != 0x0001) {
      extra = extra.subspan(4 + length);
      continue;
    }
    Bytes field = extra.subspan(4, length);
    for (std::uint64_t* const value : {&size, &stored, &header}) {
      if (*value != kMost32) continue;
      if (field.size() < 8) refuse("a zip64 field is too short");
      *value = u64(field, 0);
      field = field.subspan(8);
    }
    return;
  }
}

/// The entry at the start of `directory`, which shrinks by it.
Central take_central(Bytes& directory) {
  if (directory.size() < 46 || u32(directory, 0) != kCentralMark) refuse("its central directory is damaged");
  const std::size_t name = u16(directory, 28), extra = u16(directory, 30), comment = u16(directory, 32);
  if (directory.size() - 46 < name + extra + comment) refuse("its central directory ends within an entry");
  Central entry{chars(directory.subspan(46, name)), u32(directory, 24), u32(directory, 42),
                u32(directory, 16), u16(directory, 8)};
  std::uint64_t stored = u32(directory, 20);
  apply_zip64(directory.subspan(46 + name, extra), entry.size, stored, entry.header);
  if (u16(directory, 10) != 0) {
    refuse("compressed member '{}' (method {}); torch.save stores", printable(entry.name),
           u16(directory, 10));
  }
  if (entry.flags & 1) refuse("encrypted member '{}'", printable(entry.name));
  if (stored != entry.size)
    refuse("member '{}' is stored in {} bytes but has {}", printable(entry.name), stored, entry.size);
  directory = directory.subspan(46 + name + extra + comment);
  return entry;
}

/// Names never become paths here; still a file with such names is no work of torch.
void check_name(std::string_view name) {
  const auto bad = [&](std::string_view why) { refuse("member name '{}' {}", printable(name), why); };
  if (name.empty() || name.front() == '/') bad("is absolute or empty");
  if (name.find('\\') != name.npos || name.find('\0') != name.npos) bad("holds a backslash or NUL");
  for (std::size_t begin = 0; begin <= name.size();) {
    const std::size_t end = std::min(name.find('/', begin), name.size());
    const auto step = name.substr(begin, end - begin);
    if (step.empty() || step == "." || step == "..") bad("has an empty, '.' or '..' step");
    begin = end + 1;
  }
}

/// The root folder's name, which all members share.
std::string_view root_of(std::string_view name) {
  const std::size_t slash = name.find('/');
  if (slash == name.npos) refuse("member '{}' is in no folder", printable(name));
  return name.substr(0, slash);
}

/// Compares with the local header and returns where the data starts.
std::uint64_t data_at(Windows& part, const Central& entry) {
  Bytes header = part.at(entry.header, 30);
  if (u32(header, 0) != kLocalMark)
    refuse("member '{}' has no header at byte {}", printable(entry.name), entry.header);
  const std::size_t name = u16(header, 26), extra = u16(header, 28);
  header = part.at(entry.header, 30 + name + extra);
  if (chars(header.subspan(30, name)) != entry.name) {
    refuse("member '{}' is called '{}' in its own header", printable(entry.name),
           printable(chars(header.subspan(30, name))));
  }
  if (u16(header, 8) != 0) refuse("compressed member '{}'", printable(entry.name));
  std::uint64_t size = u32(header, 22), stored = u32(header, 18), unused = 0;
  const bool sizes_follow = u16(header, 6) & 8;
  if (!sizes_follow) {
    apply_zip64(header.subspan(30 + name, extra), size, stored, unused);
    if (size != entry.size)
      refuse("member '{}' has {} bytes, its own header says {}", printable(entry.name), entry.size, size);
  }
  return entry.header + 30 + name + extra;
}

struct Extent {
  std::uint64_t begin, end;
  std::size_t record;
};

/// Places every record, in the order of the file so that reads move forward.
void place(Windows& part, std::span<const Central> entries, std::uint64_t directory_at,
           std::vector<ZipRecord>& records) {
  std::vector<Extent> order(entries.size());
  for (std::size_t i = 0; i < entries.size(); ++i) order[i] = {entries[i].header, 0, i};
  std::sort(order.begin(), order.end(), [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
  std::uint64_t free_from = 0;
  for (const Extent& next : order) {
    const Central& entry = entries[next.record];
    if (entry.header < free_from) refuse("member '{}' overlaps another", printable(entry.name));
    if (!within(entry.header, 30, directory_at))
      refuse("member '{}' is outside the archive", printable(entry.name));
    const std::uint64_t data = data_at(part, entry);
    if (!within(data, entry.size, directory_at))
      refuse("member '{}' is outside the archive", printable(entry.name));
    records[next.record].offset = part.begin() + data;
    free_from = data + entry.size;
  }
}

void sort_by_name(std::vector<ZipRecord>& records) {
  std::sort(records.begin(), records.end(),
            [](const ZipRecord& a, const ZipRecord& b) { return a.name < b.name; });
  const auto twice =
      std::adjacent_find(records.begin(), records.end(),
                         [](const ZipRecord& a, const ZipRecord& b) { return a.name == b.name; });
  if (twice != records.end()) refuse("member '{}' is there twice", printable(twice->name));
}

std::vector<Central> read_central(Bytes directory, std::uint64_t records) {
  std::vector<Central> entries;
  entries.reserve(records);
  for (std::uint64_t i = 0; i < records; ++i) entries.push_back(take_central(directory));
  if (!directory.empty()) refuse("{} bytes after the last entry of its central directory", directory.size());
  return entries;
}

/// The directory's bytes: a view of the tail, or of `own`, for large ones.
Bytes directory_bytes(Windows& part, const End& end, std::vector<std::byte>& own) {
  const Bytes tail = part.tail(0);
  const std::uint64_t tail_at = part.length() - tail.size();
  if (end.at >= tail_at) return tail.subspan(end.at - tail_at, end.bytes);
  own.resize(end.bytes);
  part.file().read(part.begin() + end.at, own);
  return own;
}

}  // namespace

const ZipRecord* ZipDirectory::find(std::string_view name) const {
  const auto found =
      std::lower_bound(records.begin(), records.end(), name,
                       [](const ZipRecord& record, std::string_view wanted) { return record.name < wanted; });
  return found != records.end() && found->name == name ? &*found : nullptr;
}

Windows::Windows(const File& file, std::uint64_t begin, std::uint64_t length)
    : file_(file), begin_(begin), length_(length), tail_at_(length) {
  shard::require(within(begin, length, file.size()), Code::BadFormat, [&] {
    return fmt::format("{}: bytes {} to {}+{} are wanted, the file has {}", file.name(), begin, begin, length,
                       file.size());
  });
}

Bytes Windows::tail(std::uint64_t bytes) {
  const std::uint64_t wanted = std::min(bytes, length_);
  if (wanted > tail_.size()) {
    tail_.resize(wanted);
    tail_at_ = length_ - wanted;
    file_.read(begin_ + tail_at_, tail_);
  }
  return tail_;
}

Bytes Windows::at(std::uint64_t offset, std::uint64_t length) {
  if (!within(offset, length, length_))
    refuse("bytes {}+{} are outside its {} bytes", offset, length, length_);
  if (length_ <= kWholeAtOnce) tail(length_);
  if (offset >= tail_at_) return Bytes(tail_).subspan(offset - tail_at_, length);
  if (offset < place_at_ || !within(offset - place_at_, length, place_.size())) {
    place_.resize(std::min(std::max(length, kPlace), length_ - offset));
    place_at_ = offset;
    file_.read(begin_ + offset, place_);
  }
  return Bytes(place_).subspan(offset - place_at_, length);
}

ZipDirectory read_zip(Windows& part) {
  const End end = read_end(part);
  if (!within(end.at, end.bytes, end.position))
    refuse("its central directory is outside the archive; truncated?");
  if (end.records == 0) refuse("is empty");
  if (end.records > end.bytes / 46)
    refuse("{} entries in {} bytes of central directory", end.records, end.bytes);
  std::vector<std::byte> own;
  const auto entries = read_central(directory_bytes(part, end, own), end.records);

  ZipDirectory directory{std::string(root_of(entries[0].name)), {}, false};
  directory.records.reserve(entries.size());
  for (const Central& entry : entries) {
    check_name(entry.name);
    if (root_of(entry.name) != directory.root)
      refuse("member '{}' is outside the folder '{}'", printable(entry.name), printable(directory.root));
    directory.records.push_back(
        {std::string(entry.name.substr(directory.root.size() + 1)), 0, entry.size, entry.crc32});
    directory.crcs_recorded |= entry.crc32 != 0;
  }
  place(part, entries, end.at, directory.records);
  sort_by_name(directory.records);
  return directory;
}

ZipDirectory read_zip(const File& file, std::uint64_t begin, std::uint64_t length) {
  Windows part(file, begin, length);
  return read_zip(part);
}

}  // namespace formats
