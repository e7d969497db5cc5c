// One data set a tensor, in groups by key. Every chunk is a stream: its bytes are gathered, packed by the thread that
// completes them, and handed to the library.
#include "formats/hdf5/hdf5.h"

#include "formats/hdf5/chunk_filters.h"
#include "formats/hdf5/types.h"
#include "formats/hf/hf.h"
#include "formats/megatron/common_state.h"
#include "formats/megatron/writers.h"
#include "formats/plain.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <set>

namespace formats::hdf5 {
namespace {

using shard::Code;
using shard::Index;

constexpr std::uint64_t kChunkBytes = 1 << 20;
constexpr int kLevel = 1;

struct OutputFile {
  Handle file;
  std::shared_ptr<std::atomic<std::uint64_t>> stored = std::make_shared<std::atomic<std::uint64_t>>(0);  ///< bytes of all data sets, packed
  ~OutputFile() {
    const Library lock;
    file = Handle();
  }
};

/// One data set being written.
struct Output {
  std::shared_ptr<OutputFile> file;
  Handle dataset;
  std::string key;
  ~Output() {
    const Library lock;
    dataset = Handle();
  }
};

class ChunkSink final : public StreamSink {
 public:
  /// `size` bytes of the whole chunk, of which `expected` will come.
  ChunkSink(std::shared_ptr<Output> output, std::vector<hsize_t> offset, std::uint64_t size, std::uint64_t expected)
      : output_(std::move(output)), offset_(std::move(offset)), size_(size), expected_(expected) {}

  void write(std::uint64_t offset, std::span<const std::byte> from) override {
    {
      const std::lock_guard lock(mutex_);
      if (bytes_.empty()) bytes_.resize(size_);
    }
    std::memcpy(bytes_.data() + offset, from.data(), from.size());
    if (written_.fetch_add(from.size()) + from.size() == expected_) store();
  }
  /// What was never written reads as zeros. Nothing comes any more.
  void finish() {
    if (written_ != expected_) {
      bytes_.resize(size_);
      store();
    }
    output_.reset();
  }

 private:
  void store() {
    auto packed = offset_.empty() ? std::vector<std::byte>() : pack(bytes_, kLevel);
    const Library lock;
    herr_t status = 0;
    if (offset_.empty()) {
      const Handle type(H5Dget_type(output_->dataset));
      status = H5Dwrite(output_->dataset, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, bytes_.data());
    } else {
      status = H5Dwrite_chunk(output_->dataset, H5P_DEFAULT, 0, offset_.data(), packed.size(), packed.data());
    }
    shard::require(status >= 0, Code::Io, [&] { return fmt::format("{}: a chunk cannot be written; is the disk full?", output_->key); });
    *output_->file->stored += offset_.empty() ? bytes_.size() : packed.size();
    std::vector<std::byte>().swap(bytes_);  // an assignment would keep the memory
  }

  std::shared_ptr<Output> output_;
  std::vector<hsize_t> offset_;  ///< empty: the data set is one piece
  std::uint64_t size_, expected_;
  std::mutex mutex_;
  std::vector<std::byte> bytes_;
  std::atomic<std::uint64_t> written_ = 0;
};

struct Wish {
  std::string key;
  shard::DType dtype;
  shard::Shape shape;
  bool vocabulary = false;
  int cut = -1;         ///< dimension cut among tensor ranks
  Index ways = 1;
};

/// Chunks lie inside one tensor rank's part, of at most about a MiB, whole rows first.
shard::Shape chunk_of(const Wish& wish) {
  auto chunk = wish.shape;
  if (wish.cut >= 0 && wish.ways > 1) {
    auto& side = chunk[static_cast<std::size_t>(wish.cut)];
    side = std::max<Index>(1, side / wish.ways);
  }
  auto bytes = static_cast<std::uint64_t>(shard::volume(chunk)) * size_of(wish.dtype);
  for (std::size_t d = 0; d < chunk.size() && bytes > kChunkBytes; ++d) {
    const auto parts = static_cast<Index>(std::min<std::uint64_t>((bytes + kChunkBytes - 1) / kChunkBytes, static_cast<std::uint64_t>(chunk[d])));
    auto side = (chunk[d] + parts - 1) / parts;
    while (side > 1 && chunk[d] % side != 0 && chunk[d] % (side - 1) == 0) --side;  // even pieces where they are near
    bytes = bytes / static_cast<std::uint64_t>(chunk[d]) * static_cast<std::uint64_t>(side);
    chunk[d] = side;
  }
  return chunk;
}

class Writer {
 public:
  Writer(const std::filesystem::path& path, const TargetOptions& options, Target& target) : target_(target) {
    prepare();
    target.writer = make_writer(path, options);
    const auto index = target.writer->folder().add("model.h5");
    const auto name = target.writer->folder().path(index).string();
    const Library lock;
    file_ = std::make_shared<OutputFile>();
    target.writer->count_packed(file_->stored);
    const Handle access(H5Pcreate(H5P_FILE_ACCESS));
    H5Pset_libver_bounds(access, H5F_LIBVER_V18, H5F_LIBVER_V110);
    H5Pset_fclose_degree(access, H5F_CLOSE_STRONG);
    file_->file = checked(H5Fcreate(name.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, access), Code::Io, fmt::format("{}: cannot be created", name));
    links_ = Handle(H5Pcreate(H5P_LINK_CREATE));
    H5Pset_create_intermediate_group(links_, 1);
  }

  void tensors(const std::vector<Wish>& wishes) {
    for (const auto& wish : wishes)  // its names are C's
      shard::require(!wish.key.empty() && wish.key.find('\0') == wish.key.npos, Code::BadFormat,
                     [&] { return fmt::format("a key that is empty or holds a NUL has no name in HDF5: '{}'", wish.key.c_str()); });
    const Library lock;
    const bool grouped = can_be_grouped(wishes);
    for (std::size_t i = 0; i < wishes.size(); ++i) add(wishes[i], grouped ? grouped_path(wishes[i].key) : fmt::format("tensors/{:06d}", i));
  }

  void bytes(const std::string& name, std::string_view content) {
    const Library lock;
    const hsize_t size = content.size();
    const Handle space(H5Screate_simple(1, &size, nullptr));
    const Handle list(H5Pcreate(H5P_DATASET_CREATE));
    if (size > 0) {
      H5Pset_chunk(list, 1, &size);
      H5Pset_fletcher32(list);
    }
    const auto dataset = checked(H5Dcreate2(file_->file, fmt::format("{}/{}", kReserved, name).c_str(), H5T_STD_U8LE, space, links_, list, H5P_DEFAULT), Code::Io, name + ": cannot be written");
    const bool written = size == 0 || H5Dwrite(dataset, H5T_NATIVE_UINT8, H5S_ALL, H5S_ALL, H5P_DEFAULT, content.data()) >= 0;
    shard::require(written, Code::Io, [&] { return name + ": cannot be written; is the disk full?"; });
  }

  void attribute(const char* name, const std::string& text) {
    const Library lock;
    set_attribute(file_->file, name, text);
  }

  void finish() {
    target_.writer->before_commit([sinks = std::move(sinks_), file = file_] {
      for (const auto& sink : sinks) sink->finish();
      const Library lock;
      // Closed, and with it the library's lock on it gone, before it is read again. Data sets that hold no bytes are closed by it, too.
      const bool written = H5Fflush(file->file, H5F_SCOPE_GLOBAL) >= 0;
      shard::require(file->file.close() && written, Code::Io, [] { return "model.h5: cannot be written; is the disk full?"; });
    });
  }

 private:
  static std::string grouped_path(const std::string& key) {
    auto path = "model/" + key;
    std::replace(path.begin(), path.end(), '.', '/');
    return path;
  }

  /// A key that is also the beginning of another, or has parts that are no names, has no place in a tree.
  static bool can_be_grouped(const std::vector<Wish>& wishes) {
    std::set<std::string> paths;
    for (const auto& wish : wishes) {
      if (wish.key.find('/') != wish.key.npos || wish.key.find("..") != wish.key.npos || wish.key.starts_with('.') || wish.key.ends_with('.') || wish.key.empty()) return false;
      paths.insert(grouped_path(wish.key) + "/");
    }
    for (auto it = paths.begin(); it != paths.end(); ++it)
      if (std::next(it) != paths.end() && std::next(it)->starts_with(*it)) return false;
    return true;
  }

  void add(const Wish& wish, const std::string& path) {
    const auto item = size_of(wish.dtype);
    const bool chunked = !wish.shape.empty() && shard::volume(wish.shape) > 0;
    const Handle list(H5Pcreate(H5P_DATASET_CREATE)), type(stored_type(wish.dtype));
    std::vector<hsize_t> sizes(wish.shape.begin(), wish.shape.end());
    const Handle space(wish.shape.empty() ? H5Screate(H5S_SCALAR) : H5Screate_simple(static_cast<int>(sizes.size()), sizes.data(), nullptr));
    shard::Shape chunk;
    if (chunked) {
      chunk = chunk_of(wish);
      const std::vector<hsize_t> wanted(chunk.begin(), chunk.end());
      H5Pset_chunk(list, static_cast<int>(wanted.size()), wanted.data());
      const unsigned level = kLevel;
      H5Pset_filter(list, kZstd, H5Z_FLAG_MANDATORY, 1, &level);
      H5Pset_fletcher32(list);
    }
    auto output = std::make_shared<Output>();
    output->file = file_;
    output->key = wish.key;
    output->dataset = checked(H5Dcreate2(file_->file, path.c_str(), type, space, links_, list, H5P_DEFAULT), Code::Io, fmt::format("{}: cannot be created in model.h5", wish.key));
    set_attribute(output->dataset, "name", wish.key);
    if (const auto torch = torch_attribute(wish.dtype); !torch.empty()) set_attribute(output->dataset, "torch_dtype", torch);
    auto& tensor = target_.writer->described().tensors[wish.key];
    tensor = {wish.key, wish.dtype, wish.shape, wish.shape, {}, wish.vocabulary};
    if (!chunked) {
      const auto bytes = static_cast<std::uint64_t>(shard::volume(wish.shape)) * item;
      auto stride = shard::row_major(wish.shape);
      for (auto& step : stride) step *= static_cast<Index>(item);
      if (bytes > 0) sinks_.push_back(std::make_shared<ChunkSink>(output, std::vector<hsize_t>(), bytes, bytes));
      const auto stream = bytes > 0 ? target_.writer->add_stream(sinks_.back(), bytes) : target_.writer->add_stream(std::make_shared<ChunkSink>(output, std::vector<hsize_t>(), 0, 0), 0);
      tensor.shards.push_back({shard::whole(wish.shape), {stream, 0, std::move(stride)}, {}});
      return;
    }
    auto stride = shard::row_major(chunk);
    for (auto& step : stride) step *= static_cast<Index>(item);
    const auto whole = static_cast<std::uint64_t>(shard::volume(chunk)) * item;
    shard::Shape counts;
    for (std::size_t d = 0; d < chunk.size(); ++d) counts.push_back((wish.shape[d] + chunk[d] - 1) / chunk[d]);
    for (Index n = 0; n < shard::volume(counts); ++n) {
      const auto at = shard::unravel(n, counts);
      shard::Box box;
      std::vector<hsize_t> offset;
      for (std::size_t d = 0; d < chunk.size(); ++d) {
        box.lo.push_back(at[d] * chunk[d]);
        box.size.push_back(std::min(chunk[d], wish.shape[d] - box.lo.back()));
        offset.push_back(static_cast<hsize_t>(box.lo.back()));
      }
      sinks_.push_back(std::make_shared<ChunkSink>(output, std::move(offset), whole, static_cast<std::uint64_t>(shard::volume(box.size)) * item));
      tensor.shards.push_back({std::move(box), {target_.writer->add_stream(sinks_.back(), whole), 0, stride}, {}});
    }
  }

  Target& target_;
  std::shared_ptr<OutputFile> file_;
  Handle links_;
  std::vector<std::shared_ptr<ChunkSink>> sinks_;
};

}  // namespace

void create(const std::filesystem::path& path, const Checkpoint& source, const TargetOptions& options, Target& target) {
  shard::require(!options.joint, Code::Usage, [] { return "hdf5: one process writes it; not several ranks, nor parts (--part)"; });
  Writer writer(path, options, target);
  writer.attribute("shardkit", "1");
  writer.attribute("family", source.family);
  for (const auto& [alias, owner] : source.logical.ties) writer.attribute(("tied." + alias).c_str(), owner);
  std::vector<Wish> wishes;
  if (source.megatron) {
    const auto model = megatron::model_for(source, options, "d");
    target.padded_vocab = model.params.at("vocab");
    for (const auto& one : model.wanted)
      wishes.push_back({one.key, one.dtype, one.shape, one.row->vocabulary, one.row->cut, one.row->ways == shard::Ways::ExpertTensor ? model.parallel.etp : model.parallel.tp});
    writer.tensors(wishes);
    writer.bytes("common.pkl", megatron::common_pickle(source, model, target));
    writer.attribute("layout", fmt::format("tp {} pp {} vpp {} ep {} etp {}", model.parallel.tp, model.parallel.pp, model.parallel.vpp, model.parallel.ep, model.parallel.etp));
    for (const auto& [name, extra] : source.megatron->extra)
      if (extra.kind != ExtraState::Kind::None) target.dropped.push_back({name + "._extra_state", "HDF5 holds only tensors"});
    if (source.hf)
      for (const auto& name : source.hf->files) target.dropped.push_back({"hf/" + name, "HDF5 has no place beside a Megatron model"});
    target.carried = {"args", "iteration"};
    writer.finish();
    megatron::describe_logical(target, source, model);
  } else {
    for (const auto& one : same_keys(source, options)) wishes.push_back({one.key, one.dtype, one.shape, false, one.shape.size() > 1 ? 0 : -1, options.parallel.tp});
    writer.tensors(wishes);
    if (source.hf && !source.hf->config.is_null()) writer.bytes("config.json", source.hf->config.dump(2));
    for (const auto& object : source.stored.objects) target.dropped.push_back({object.key, "HDF5 holds only tensors"});
    writer.finish();
    hf::carry_files(source, target, "", options.dtype);
    join(source, target);
  }
}

}  // namespace formats::hdf5
