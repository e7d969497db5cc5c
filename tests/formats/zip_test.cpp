// The directory of torch zip archives: what we lay out is read back, what does not fit together is refused.
#include "formats/zip.h"

#include <doctest/doctest.h>

#include <cstring>
#include <string>

#include "libshard/error.h"
#include "tests/formats/temporary_file.h"

namespace {

using namespace formats;
using namespace std::string_literals;

const std::vector<std::pair<std::string, std::string>> kMembers = {
    {"data.pkl", "pickle"}, {"data/0", std::string(100, 'a')}, {"data/1", ""}, {"version", "3\n"}};

/// An archive of ours; payload i has CRC crc + i.
std::string archive(const std::vector<std::pair<std::string, std::string>>& members = kMembers,
                    std::uint32_t crc = 1) {
  std::vector<std::pair<std::string, std::uint64_t>> entries;
  std::vector<std::uint32_t> crcs;
  for (const auto& [name, bytes] : members) {
    entries.emplace_back(name, bytes.size());
    crcs.push_back(crc ? crc++ : 0);
  }
  const ZipLayout layout("root", entries);
  std::string file(layout.size(), '?');
  for (const auto& [offset, bytes] : layout.frame(crcs)) file.replace(offset, bytes.size(), bytes);
  for (std::size_t i = 0; i < members.size(); ++i) {
    CHECK(layout.data_offset(i) % 64 == 0);
    file.replace(layout.data_offset(i), members[i].second.size(), members[i].second);
  }
  return file;
}

std::string refusal(const std::string& bytes) {
  const TemporaryFile temporary(bytes);
  const File file = temporary.open();
  try {
    read_zip(file, 0, file.size());
    return "";
  } catch (const shard::Error& error) {
    CHECK(error.code == shard::Code::BadFormat);
    return error.what();
  }
}

void check_refused(const std::string& bytes, std::string_view why) {
  const std::string text = refusal(bytes);
  CHECK_MESSAGE(text.find(why) != text.npos, text);
}

/// Every occurrence replaced, of the same length.
std::string with(std::string bytes, const std::string& old, const std::string& fresh) {
  REQUIRE(old.size() == fresh.size());
  REQUIRE(bytes.find(old) != bytes.npos);
  for (std::size_t at = 0; (at = bytes.find(old, at)) != bytes.npos; at += old.size())
    bytes.replace(at, old.size(), fresh);
  return bytes;
}

void store(std::string& bytes, std::size_t at, std::uint64_t value, std::size_t size) {
  std::memcpy(bytes.data() + at, &value, size);
}

std::size_t central_of(const std::string& bytes, int number) {
  std::size_t at = bytes.find("PK\x01\x02");
  for (int i = 0; i < number; ++i) at = bytes.find("PK\x01\x02", at + 1);
  return at;
}

}  // namespace

TEST_CASE("zip: what is laid out is read back, anywhere in a file") {
  const std::string bytes = archive();
  for (const std::size_t before : {0, 1, 4096}) {
    const TemporaryFile temporary(std::string(before, 'x') + bytes + "behind");
    const File file = temporary.open();
    const ZipDirectory directory = read_zip(file, before, bytes.size());
    CHECK(directory.root == "root");
    CHECK(directory.crcs_recorded);
    REQUIRE(directory.records.size() == 4);
    for (const auto& [name, content] : kMembers) {
      const ZipRecord* const record = directory.find(name);
      REQUIRE(record);
      CHECK(file.text(record->offset, record->size) == content);
    }
    CHECK(directory.find("data/0")->crc32 == 2);
    CHECK_FALSE(directory.find("data/2"));
  }
}

TEST_CASE("zip: large archives and many members") {
  std::vector<std::pair<std::string, std::string>> members;
  for (int i = 0; i < 2000; ++i)
    members.emplace_back("data/" + std::to_string(i), std::string(i % 7 * 100, 'b'));
  members.emplace_back("big", std::string(300'000, 'c'));
  const TemporaryFile temporary(archive(members));
  const File file = temporary.open();
  const auto directory = read_zip(file, 0, file.size());
  REQUIRE(directory.records.size() == 2001);
  for (const auto& [name, content] : members) {
    const ZipRecord& record = *directory.find(name);
    CHECK(file.text(record.offset, record.size) == content);
  }
}

TEST_CASE("zip: numbers beyond 32 bits") {
  constexpr std::uint64_t kBig = std::uint64_t{5} << 30;
  const ZipLayout layout("r", {{"small", 3}, {"big", kBig}, {"after", 7}, {"edge", 0xFFFFFFFF}});
  CHECK(layout.data_offset(2) > kBig);
  CHECK(layout.data_offset(2) % 64 == 0);
  const auto frame = layout.frame(std::vector<std::uint32_t>(4, 9));
  CHECK(frame.back().first + frame.back().second.size() == layout.size());
  // A file with holes: nothing but the frame is on the disk.
  const TemporaryFile temporary("");
  const File file = temporary.open();
  const std::string path = file.name();
  {
    std::fstream out(path, std::ios::in | std::ios::out | std::ios::binary);
    for (const auto& [offset, bytes] : frame) {
      out.seekp(static_cast<std::streamoff>(offset))
          .write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    }
  }
  const File big(path);
  const auto directory = read_zip(big, 0, layout.size());
  CHECK(directory.find("big")->size == kBig);
  CHECK(directory.find("after")->offset == layout.data_offset(2));
  CHECK(directory.find("edge")->size == 0xFFFFFFFF);
  CHECK(directory.find("edge")->offset == layout.data_offset(3));
}

TEST_CASE("zip: the zip64 record decides over the classic one") {
  std::string bytes = archive();
  const std::size_t end = bytes.size() - 22;
  store(bytes, end + 8, 77, 2);
  store(bytes, end + 16, 0x12345678, 4);
  CHECK(refusal(bytes) == "");
  // Without a locator the classic one counts.
  store(bytes, end - 20, 0, 4);
  CHECK(refusal(bytes) != "");
  std::string classic = archive();
  store(classic, end - 20, 0, 4);
  CHECK(refusal(classic) == "");
}

TEST_CASE("zip: all CRCs zero means that none is recorded") {
  const TemporaryFile temporary(archive(kMembers, 0));
  const File file = temporary.open();
  CHECK_FALSE(read_zip(file, 0, file.size()).crcs_recorded);
}

TEST_CASE("zip: names that leave the folder, or are there twice") {
  check_refused(with(archive(), "root/version", "root/../sion"), "'.' or '..' step");
  check_refused(with(archive(), "root/version", "/oot/version"), "is absolute");
  check_refused(with(archive(), "root/version", "root\\version"), "holds a backslash");
  check_refused(with(archive(), "root/version", "root/vers\0on"s), "holds a backslash or NUL");
  check_refused(with(archive(), "root/version", "soot/version"), "outside the folder 'root'");
  check_refused(with(archive(), "root/version", "root//ersion"), "step");
  check_refused(with(archive(), "root/data/1", "root/data/0"), "member 'data/0' is there twice");
  check_refused(with(archive(), "root/version", "root_version"), "is in no folder");
}

TEST_CASE("zip: the directory has to agree with the members' own headers") {
  std::string bytes = archive();
  const std::size_t central = central_of(bytes, 1);
  const auto changed = [&](std::size_t at, std::uint64_t value, std::size_t size) {
    std::string copy = bytes;
    store(copy, at, value, size);
    return copy;
  };
  check_refused(changed(central + 10, 8, 2), "compressed member 'root/data/0'");
  check_refused(changed(central + 8, 1, 2), "encrypted member");
  check_refused(changed(central + 24, 101, 4), "stored in 100 bytes");
  check_refused(changed(central + 42, bytes.find("PK\x03\x04", 4) + 1, 4), "has no header");
  check_refused(changed(central + 42, 0, 4), "overlaps");
  check_refused(changed(central + 42, 0x7FFFFFFF, 4), "outside the archive");
  check_refused(changed(central, 0, 1), "central directory is damaged");
  std::string larger = changed(central + 24, 5000, 4);
  store(larger, central + 20, 5000, 4);
  check_refused(larger, "its own header says 100");
  std::string renamed = bytes;
  renamed.replace(renamed.find("root/data/0"), 11, "root/data/7");
  check_refused(renamed, "is called 'root/data/7' in its own header");
}

TEST_CASE("zip: a length that only follows the data may not overlap the next member") {
  std::string bytes = archive();
  const std::size_t central = central_of(bytes, 1), local = bytes.find("PK\x03\x04", 4);
  store(bytes, local + 6, 0x0808, 2);
  store(bytes, local + 14, 0, 8);
  store(bytes, local + 22, 0, 4);
  CHECK(refusal(bytes) == "");
  store(bytes, central + 20, 1000, 4);
  store(bytes, central + 24, 1000, 4);
  CHECK(refusal(bytes) != "");
}

TEST_CASE("zip: cut anywhere, it is refused") {
  const std::string bytes = archive();
  const TemporaryFile temporary("");
  for (std::size_t length = 0; length < bytes.size(); ++length) {
    CAPTURE(length);
    temporary.write(bytes.substr(0, length));
    const File file = temporary.open();
    CHECK_THROWS_AS(read_zip(file, 0, file.size()), shard::Error);
  }
  check_refused(bytes.substr(0, bytes.size() / 2), "truncated?");
  check_refused("", "truncated?");
  const TemporaryFile whole(bytes);
  const File file = whole.open();
  CHECK_THROWS_AS(read_zip(file, 1, file.size()), shard::Error);
  CHECK_THROWS_AS(read_zip(file, ~std::uint64_t{0}, 2), shard::Error);
}

TEST_CASE("zip: any byte changed, it is read or refused") {
  const std::string good = archive();
  const TemporaryFile temporary("");
  for (std::size_t at = 0; at < good.size(); ++at) {
    for (const int change : {0x01, 0x80, 0xFF}) {
      std::string bytes = good;
      bytes[at] = static_cast<char>(bytes[at] ^ change);
      temporary.write(bytes);
      const File file = temporary.open();
      try {
        read_zip(file, 0, file.size());
      } catch (const shard::Error&) {
      }
    }
  }
}
