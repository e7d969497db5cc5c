// Each chunk is a torch.save archive of one tensor, somewhere in a file.
#include "formats/torch_dcp/reader.h"

#include "formats/zstd_item.h"
#include "libshard/error.h"
#include "libshard/parallel.h"

#include <algorithm>
#include <mutex>

namespace formats::torch_dcp {
namespace {

using shard::Code;
using shard::Finding;

std::string chunk_name(const std::string& key, const shard::Box& box) { return fmt::format("{} {}", key, shard::to_string(box)); }

/// A chunk to be located: its tensor's key, where its shard goes.
struct Pending {
  const std::string* key;
  const Tensor* tensor;
  const Chunk* chunk;
  shard::Shard* shard;
  shard::Stream* stream;
};

void check_ranges(const Metadata& metadata, const FilePool& files) {
  const auto check = [&](const std::string& key, const Item& item) {
    const auto size = files.get(item.file)->size();
    shard::require(item.offset <= size && item.length <= size - item.offset, Code::BadFormat, [&] {
      return fmt::format("{}: item of '{}' is bytes {}+{}; the file has {}", metadata.files[item.file], key, item.offset, item.length, size);
    });
  };
  for (const auto& [key, tensor] : metadata.tensors)
    for (const auto& chunk : tensor.chunks) check(key, chunk.item);
  for (const auto& [key, item] : metadata.bytes) check(key, item);
  for (const auto& [key, item] : metadata.copies) check(key, item);
}

shard::Shape byte_strides(const shard::Shape& elements, shard::DType dtype) {
  auto out = elements;
  for (auto& stride : out) stride *= static_cast<shard::Index>(size_of(dtype));
  return out;
}

void locate(const Pending& pending, const Checkpoint& checkpoint, std::vector<Finding>& findings) {
  const auto& item = pending.chunk->item;
  const auto file = checkpoint.files->get(pending.stream->file);
  const auto archive = open_torch(*file, pending.stream->offset, pending.stream->size);
  const auto stored = tensor_of(archive.graph, archive.graph.root);
  shard::require(stored.has_value(), Code::BadFormat, [&] { return "item is no tensor"; });
  (void)item;
  if (stored->dtype != pending.tensor->dtype)
    findings.push_back({"dtype", Finding::Severity::Error, *pending.key,
                        fmt::format("chunk {} is stored as {}; .metadata says {}", shard::to_string(pending.chunk->box), shard::name(stored->dtype), shard::name(pending.tensor->dtype))});
  if (stored->sizes != pending.chunk->box.size)
    findings.push_back({"shape", Finding::Severity::Error, *pending.key,
                        fmt::format("chunk {} is stored with shape {}; .metadata says {}", shard::to_string(pending.chunk->box), shard::to_string(stored->sizes), shard::to_string(pending.chunk->box.size))});
  if (!findings.empty()) {  // never read by the wrong shape: the place stays a dense block of nothing
    pending.stream->size = 0;
    return;
  }
  const auto* record = archive.zip.find("data/" + stored->storage);
  shard::require(record != nullptr, Code::BadFormat, [&] { return fmt::format("storage '{}' is missing", stored->storage); });
  pending.stream->offset = record->offset;
  pending.stream->size = record->size;
  if (archive.zip.crcs_recorded) pending.stream->crc32 = record->crc32;
  pending.shard->place.offset = stored->offset;
  pending.shard->place.stride = byte_strides(stored->strides, stored->dtype);
}

/// A bytes item is read for its names only: what it would import must be harmless.
void scan_item(const Checkpoint& checkpoint, const std::string& key, const Item& item) {
  constexpr std::uint64_t kMost = 64 << 20;
  if (item.zstd || item.length > kMost || item.length < 4) return;
  const auto file = checkpoint.files->get(item.file);
  if (file->text(item.offset, 2) != "PK") return;  // not written by torch.save: carried as it is
  try {
    open_torch(*file, item.offset, item.length);
  } catch (const shard::Error& error) {
    throw error.within(key);
  }
}

}  // namespace

TorchFile open_item(const Checkpoint& checkpoint, const Item& item) {
  const auto file = checkpoint.files->get(item.file);
  if (item.zstd) {
    const auto plain = inflate_item(*file, item.offset, item.length);
    return open_torch(*plain, 0, plain->size());
  }
  return open_torch(*file, item.offset, item.length);
}

namespace {

/// Where ranks wrote bytes items of their own, the first one's stands for those that equal it; others are named.
void drop_copies(const Metadata& metadata, Checkpoint& checkpoint) {
  for (const auto& [key, copy] : metadata.copies) {
    const auto& first = metadata.bytes.at(key);
    if (first.zstd == copy.zstd && first.length == copy.length && same_bytes(*checkpoint.files, {first.file, first.offset}, {copy.file, copy.offset}, copy.length)) continue;
    const auto why = fmt::format("{} holds another one than {}, which is taken", metadata.files[copy.file], metadata.files[first.file]);
    checkpoint.findings.push_back({"replica", Finding::Severity::Warning, key, why});
    checkpoint.not_carried.push_back({key, why});
  }
}

/// What is wrong with the bytes of an item that is no tensor; "" where they are what torch.save wrote.
std::string damage(const File& file, std::uint64_t offset, std::uint64_t length) {
  if (length == 0) return "is empty; should be what torch.save wrote";
  const auto head = file.text(offset, std::min<std::uint64_t>(length, 2));
  if (head[0] == '\x80') return "";  // torch before 1.6: a stream without sums
  if (head != "PK") return fmt::format("is {} bytes of no known kind; should be what torch.save wrote", length);
  const auto zip = read_zip(file, offset, length);
  for (const auto& record : zip.records)
    if (auto wrong = wrong_sum(file, zip, record); !wrong.empty()) return wrong;
  return "";
}

}  // namespace

std::optional<Finding> check_object(const Checkpoint& checkpoint, const shard::ShardedObject& object) try {
  const bool item = (checkpoint.format == "dcp" || checkpoint.format == "torch_dist") && object.key != "common.pt";  // a file of its own
  const auto found = item ? damage(*checkpoint.files->get(object.file), object.offset, object.bytes) : "";
  if (found.empty()) return std::nullopt;
  return Finding{"checksum", Finding::Severity::Error, object.key, fmt::format("{}: {}", checkpoint.stored.files[object.file], found)};
} catch (const shard::Error& error) {
  if (error.code != Code::BadFormat) throw;
  return Finding{"checksum", Finding::Severity::Error, object.key, fmt::format("{}: {}", checkpoint.stored.files[object.file], error.what())};
}

Metadata read_stored(Checkpoint& checkpoint, const OpenOptions& options) {
  auto metadata = read_metadata(checkpoint.folder);
  checkpoint.findings = metadata.findings;
  std::vector<std::filesystem::path> paths;
  for (const auto& name : metadata.files) paths.push_back(inside(checkpoint.folder, name));
  checkpoint.stored.files = metadata.files;
  checkpoint.files = std::make_shared<FilePool>(std::move(paths));
  if (options.places) check_ranges(metadata, *checkpoint.files);
  const auto unpacked = [&](const Item& item) {
    if (!item.zstd || !options.places) return item;
    const auto plain = inflate_item(*checkpoint.files->get(item.file), item.offset, item.length);
    checkpoint.stored.files.push_back(metadata.files[item.file]);
    return Item{checkpoint.files->add(plain), 0, plain->size(), false};
  };
  std::size_t chunks = 0;
  for (const auto& [key, tensor] : metadata.tensors) chunks += tensor.chunks.size();
  auto& streams = checkpoint.stored.streams;
  streams.reserve(chunks);
  std::vector<Pending> pending;
  for (const auto& [key, tensor] : metadata.tensors) {
    auto& stored = checkpoint.stored.tensors[key];
    stored = {key, tensor.dtype, tensor.shape, tensor.shape, std::vector<shard::Shard>(tensor.chunks.size()), false};
    for (std::size_t i = 0; i < tensor.chunks.size(); ++i) {
      const auto item = unpacked(tensor.chunks[i].item);
      streams.push_back({item.file, item.offset, item.length, std::nullopt, false});
      auto& shard = stored.shards[i];
      shard.box = tensor.chunks[i].box;
      shard.place = {static_cast<std::uint32_t>(streams.size() - 1), 0, byte_strides(shard::row_major(shard.box.size), tensor.dtype)};
      pending.push_back({&key, &tensor, &tensor.chunks[i], &shard, &streams.back()});
    }
    check_cover(stored, checkpoint.findings);
  }
  for (const auto& [key, stored] : metadata.bytes) {
    const auto item = unpacked(stored);
    checkpoint.stored.objects.push_back({key, "bytes", item.length, item.file, item.offset});
  }
  if (!options.places) return metadata;
  drop_copies(metadata, checkpoint);
  std::mutex mutex;
  constexpr std::size_t kTogether = 64;
  shard::run_tasks((pending.size() + kTogether - 1) / kTogether, options.threads, [&](std::size_t task, unsigned) {
    for (auto i = task * kTogether; i < std::min(pending.size(), (task + 1) * kTogether); ++i) {
      std::vector<Finding> findings;
      try {
        locate(pending[i], checkpoint, findings);
      } catch (const shard::Error& error) {
        throw error.within(fmt::format("{}: {}", metadata.files[pending[i].chunk->item.file], chunk_name(*pending[i].key, pending[i].chunk->box)));
      }
      if (findings.empty()) continue;
      const std::lock_guard lock(mutex);
      checkpoint.findings.insert(checkpoint.findings.end(), findings.begin(), findings.end());
    }
  });
  return metadata;
}

Checkpoint open_plain(const std::filesystem::path& folder, const OpenOptions& options) {
  Checkpoint out;
  out.format = "dcp";
  out.folder = folder;
  const auto metadata = read_stored(out, options);
  // Megatron writes metadata.json last; without it nobody knows that this is one of its checkpoints.
  shard::require(!std::filesystem::exists(folder / "common.pt") && !metadata.bytes.contains("common_state/shard_0_1"), Code::BadFormat, [&] {
    const bool there = std::filesystem::exists(folder / "metadata.json");
    return fmt::format("{}: holds Megatron's common state but {}", folder.string(),
                       there ? "metadata.json names no sharded_backend; should be torch_dist" : "no metadata.json; an unfinished save");
  });
  for (const auto& [key, item] : metadata.bytes) scan_item(out, key, item);
  for (const auto& [key, item] : metadata.copies) scan_item(out, key, item);
  out.nesting = metadata.nesting;
  out.logical = out.stored;
  return out;
}

}  // namespace formats::torch_dcp
