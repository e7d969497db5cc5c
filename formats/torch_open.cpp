// Opening a torch.save file: which container it is, its records and its pickle. Refuses other containers by
// name, and a file whose storages are shorter than its pickle says.

#include <algorithm>
#include <cstring>

#include "formats/crc32.h"
#include "formats/kernels.h"
#include "formats/torch_legacy.h"
#include "formats/torch_save.h"
#include "formats/torch_storage.h"
#include "libshard/error.h"

namespace formats {
namespace {

using shard::Code;
using Bytes = std::span<const std::byte>;

constexpr std::uint64_t kLargestPickle = std::uint64_t{4} << 30;

template <typename... Args>
[[noreturn]] void refuse(fmt::format_string<Args...> format, Args&&... args) {
  throw shard::Error(Code::BadFormat, fmt::format(format, std::forward<Args>(args)...));
}

enum class Container { Zip, Pickle };

Container container_of(Windows& part) {
  const Bytes head = part.at(0, std::min<std::uint64_t>(part.length(), 512));
  const std::string_view text(reinterpret_cast<const char*>(head.data()), head.size());
  if (text.starts_with("PK")) return Container::Zip;
  if (text.starts_with('\x80')) return Container::Pickle;
  if (text.empty()) refuse("an empty file; a torch.save file was expected");
  if (text.size() > 262 && text.substr(257, 5) == "ustar") {
    refuse("a tar file of torch before 0.1.10, which is not supported");
  }
  if (text.size() > 8 && text[8] == '{') refuse("a safetensors file; a torch.save file was expected");
  refuse("no torch.save file: neither a zip archive nor a pickle");
}

void check_records(Windows& part, const ZipDirectory& zip) {
  const bool script =
      zip.find("constants.pkl") || std::any_of(zip.records.begin(), zip.records.end(),
                                               [](const auto& r) { return r.name.starts_with("code/"); });
  if (script) refuse("a TorchScript archive holds a program, which is not supported");
  if (!zip.find("data.pkl")) refuse("a zip archive without data.pkl is no torch.save file");
  if (!zip.find("version") && !zip.find(".data/version")) refuse("no record 'version'; torch cannot load it");
  const ZipRecord* const order = zip.find("byteorder");
  if (!order) return;
  const Bytes value = part.at(order->offset - part.begin(), std::min<std::uint64_t>(order->size, 16));
  const std::string_view text(reinterpret_cast<const char*>(value.data()), value.size());
  if (text != "little")
    refuse("byteorder is '{}'; only little-endian files are supported", text == "big" ? text : "?");
}

pickle::Graph read_pickle(Windows& part, const ZipDirectory& zip) {
  const ZipRecord& record = *zip.find("data.pkl");
  if (record.size > kLargestPickle) refuse("data.pkl has {} bytes; at most {}", record.size, kLargestPickle);
  const Bytes bytes = part.at(record.offset - part.begin(), record.size);
  if (zip.crcs_recorded) {
    const auto crc = crc32(std::as_bytes(std::span(bytes)));
    if (crc != record.crc32) refuse("data.pkl: CRC-32 is {:08x}; {:08x} is recorded", crc, record.crc32);
  }
  return pickle::parse(bytes);
}

/// Every storage that the pickle names is a record, long enough.
void check_storages(const TorchFile& file) {
  std::string name;
  for (pickle::Ref ref = 0; ref < file.graph.size(); ++ref) {
    if (file.graph.kind(ref) != pickle::Kind::Persistent) continue;
    const auto storage = storage_of(file.graph, ref);
    if (!storage) continue;
    name.assign("data/").append(storage->key);
    const ZipRecord* const record = file.zip.find(name);
    if (!record) refuse("storage '{}' has no record '{}'", storage->key, name);
    if (record->size < storage->bytes) {
      refuse("record '{}' has {} bytes; storage '{}' has {}", name, record->size, storage->key,
             storage->bytes);
    }
  }
}

}  // namespace

TorchFile open_torch(const File& file, std::uint64_t begin, std::uint64_t length) {
  Windows part(file, begin, length);
  if (container_of(part) == Container::Pickle) return read_legacy(part);
  ZipDirectory zip = read_zip(part);
  check_records(part, zip);
  pickle::Graph graph = read_pickle(part, zip);
  TorchFile opened{std::move(zip), std::move(graph)};
  check_storages(opened);
  return opened;
}

std::string wrong_sum(const File& file, const ZipDirectory& zip, const ZipRecord& record) {
  constexpr std::uint64_t kBlock = 1 << 20;
  if (!zip.crcs_recorded) return "";
  std::uint32_t crc = 0;
  std::vector<std::byte> block(std::min(record.size, kBlock));
  for (std::uint64_t done = 0; done < record.size; done += block.size()) {
    const auto part = std::span(block).first(std::min<std::uint64_t>(block.size(), record.size - done));
    file.read(record.offset + done, part);
    crc = kernels().combine(crc, crc32(part), part.size());
  }
  return crc == record.crc32 ? "" : fmt::format("{}: CRC-32 of the stored bytes is {:08x}; the file says {:08x}", record.name, crc, record.crc32);
}

TorchFile open_torch(const File& file) { return open_torch(file, 0, file.size()); }

shard::ShardedStateDict summed_records(const std::filesystem::path& path, const std::string& name) try {
  const auto archive = open_torch(File(path));
  shard::ShardedStateDict out;
  out.files = {name};
  if (archive.zip.crcs_recorded) {
    for (const auto& record : archive.zip.records)
      out.streams.push_back({0, record.offset, record.size, record.crc32, false});
  }
  return out;
} catch (const shard::Error& error) {
  throw error.within(path.string());
}

}  // namespace formats
