// What an HDF5 file holds. Links that lead out of the file, and data sets kept in other files, are refused.
#include "formats/hdf5/hdf5.h"

#include "formats/hdf5/chunked.h"
#include "formats/hdf5/types.h"
#include "formats/hf/hf.h"
#include "formats/megatron/common_state.h"
#include "formats/megatron/model.h"

#include <algorithm>
#include <fstream>
#include <set>

namespace formats::hdf5 {
namespace {

namespace fs = std::filesystem;
using shard::Code;
using shard::Index;

constexpr char kSignature[] = "\x89HDF\r\n\x1a\n";
constexpr std::uint64_t kLargestChunk = 1ull << 30, kLargestSmall = 256u << 20, kMostUnwritten = 100'000;

struct Held final : ComputedBytes {
  std::vector<std::byte> bytes;
  void read(std::uint64_t offset, std::span<std::byte> into) const override { std::copy_n(bytes.begin() + static_cast<std::ptrdiff_t>(offset), into.size(), into.begin()); }
};

bool has_signature(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  char magic[8] = {};
  return file.read(magic, 8) && std::equal(magic, magic + 8, kSignature);
}

fs::path file_of(const fs::path& path) { return fs::is_directory(path) ? inside(path, "model.h5") : path; }

class Reader {
 public:
  Reader(const fs::path& path, const OpenOptions& options) : options_(options) {
    prepare();
    const auto file = file_of(path);
    out_.format = "hdf5";
    out_.folder = fs::is_directory(path) ? path : path.has_parent_path() ? path.parent_path() : fs::path(".");
    out_.files = std::make_shared<FilePool>(std::vector{file});
    out_.stored.files = {file.filename().string()};
    where_ = file.string();
    const Library lock;
    const Handle access(H5Pcreate(H5P_FILE_ACCESS));
    H5Pset_file_locking(access, false, true);  // checkpoints lie on file systems without locks
    file_ = checked(H5Fopen(file.c_str(), H5F_ACC_RDONLY, access), Code::BadFormat, fmt::format("{}: is no HDF5 file, or is damaged", where_));
    H5O_info_t root;
    if (H5Oget_info(file_, &root) >= 0) groups_.insert(root.addr);
    const bool walked = H5Lvisit(file_, H5_INDEX_NAME, H5_ITER_INC, &Reader::look, this) >= 0;
    if (failed_) throw shard::Error(*failed_);
    shard::require(walked, Code::BadFormat, [&] { return fmt::format("{}: its groups cannot be read to the end: it is damaged, or newer than HDF5 {}.{} can read", where_, H5_VERS_MAJOR, H5_VERS_MINOR); });
    for (const auto& path : datasets_) add(path, false);
    for (const auto& path : soft_links_) follow(path);
  }

  ~Reader() {
    const Library lock;
    file_ = Handle();
  }

  Checkpoint finish() {
    out_.logical = out_.stored;
    if (common_) {
      out_.megatron.emplace();
      megatron::take_common(out_, pickle::parse(*common_));
      megatron::take_args(out_, options_);
      megatron::interpret(out_, "d", options_);
    } else if (!config_.empty() && !fs::exists(out_.folder / "config.json")) {
      out_.embedded_config = config_;
    }
    return std::move(out_);
  }

 private:
  /// One link of the file; links, not objects, so that a second name of a data set is not lost. External ones name other files.
  static herr_t look(hid_t group, const char* name, const H5L_info_t* info, void* data) {
    auto& self = *static_cast<Reader*>(data);
    if (info->type == H5L_TYPE_EXTERNAL || info->type >= H5L_TYPE_UD_MIN) {
      self.failed_ = std::make_unique<shard::Error>(Code::BadFormat, fmt::format("{}: '{}' is a link to another file", self.where_, name));
      return 1;
    }
    H5O_info_t object;
    if (info->type == H5L_TYPE_HARD) {
      if (H5Oget_info_by_name(group, name, &object, H5P_DEFAULT) < 0) return -1;
      if (object.type == H5O_TYPE_DATASET) self.datasets_.emplace_back(name);
      if (object.type == H5O_TYPE_GROUP && !self.groups_.insert(object.addr).second) self.out_.stored.objects.push_back({name, "another name of a group", 0, 0, 0});
    }
    if (info->type == H5L_TYPE_SOFT) self.soft_links_.emplace_back(name);
    return 0;
  }
  /// Another name of a data set in this file is a tensor of that name; other links are only listed.
  void follow(const std::string& path) {
    H5O_info_t info;
    const bool leads = H5Oexists_by_name(file_, path.c_str(), H5P_DEFAULT) > 0;
    if (!leads) out_.findings.push_back({"missing", shard::Finding::Severity::Warning, path, "a soft link that leads nowhere"});
    if (leads && H5Oget_info_by_name(file_, path.c_str(), &info, H5P_DEFAULT) >= 0 && info.type == H5O_TYPE_DATASET) add(path, true);
    else out_.stored.objects.push_back({path, "soft link", 0, 0, 0});
  }

  void add(const std::string& path, bool alias) {
    auto dataset = checked(H5Dopen2(file_, path.c_str(), H5P_DEFAULT), Code::BadFormat, fmt::format("{}: '{}' cannot be opened", where_, path));
    const bool reserved = path.starts_with(std::string(kReserved) + "/");
    if (reserved) return add_reserved(dataset, path.substr(std::string(kReserved).size() + 1));
    const auto place = fmt::format("{}: '{}'", where_, path);
    auto key = alias ? std::string() : text_attribute(dataset, "name", place).value_or("");
    if (key.empty()) {
      key = path;
      std::replace(key.begin(), key.end(), '/', '.');
    }
    const auto [type, refused] = type_of(dataset, place);
    if (!type) {
      if (!refused.empty()) out_.findings.push_back({"dtype", shard::Finding::Severity::Error, key, fmt::format("cannot be read as a tensor: {}", refused)});
      else out_.stored.objects.push_back({key, "no number", 0, 0, 0});
      return;
    }
    shard::require(!out_.stored.tensors.contains(key), Code::BadFormat, [&] { return fmt::format("{}: two data sets are named '{}'", where_, key); });
    const auto shape = shape_of(dataset, path);
    const auto item = size_of(type->dtype);
    std::uint64_t bytes = 0;
    shard::require(!__builtin_mul_overflow(static_cast<std::uint64_t>(shard::volume(shape)), item, &bytes) && bytes < (1ull << 62), Code::BadFormat,
                   [&] { return fmt::format("{}: '{}' is larger than any file", where_, path); });
    shard::require(bytes <= kLargestSmall || H5Dget_storage_size(dataset) > 0, Code::BadFormat, [&] { return fmt::format("{}: '{}' was never written", where_, path); });
    auto stride = shard::row_major(shape);
    for (auto& step : stride) step *= static_cast<Index>(item);
    const auto stream = add_stream(std::move(dataset), path, *type, shape, bytes);
    out_.stored.tensors[key] = {key, type->dtype, shape, shape, {{shard::whole(shape), {stream, 0, std::move(stride)}, {}}}, false};
  }

  shard::Shape shape_of(hid_t dataset, const std::string& path) const {
    const Handle space(H5Dget_space(dataset));
    const auto kind = H5Sget_simple_extent_type(space);
    if (kind == H5S_NULL) return {0};
    if (kind == H5S_SCALAR) return {};
    const int rank = H5Sget_simple_extent_ndims(space);
    shard::require(rank > 0 && rank <= H5S_MAX_RANK, Code::BadFormat, [&] { return fmt::format("{}: '{}' has no plain shape", where_, path); });
    std::vector<hsize_t> sizes(static_cast<std::size_t>(rank));
    H5Sget_simple_extent_dims(space, sizes.data(), nullptr);
    shard::Shape out;
    for (const auto size : sizes) {
      shard::require(size <= (1ull << 62), Code::BadFormat, [&] { return fmt::format("{}: '{}' has a dimension of {}", where_, path, size); });
      out.push_back(static_cast<Index>(size));
    }
    shard::volume(out);  // refuses products that overflow
    return out;
  }

  std::uint32_t computed_stream(std::shared_ptr<const ComputedBytes> bytes, std::uint64_t size) {
    const auto file = out_.files->add(std::move(bytes));
    out_.stored.files.resize(file + 1, out_.stored.files.front());
    out_.stored.streams.push_back({file, 0, size, std::nullopt, false});
    return static_cast<std::uint32_t>(out_.stored.streams.size() - 1);
  }

  std::uint32_t add_stream(Handle dataset, const std::string& path, const Type& type, const shard::Shape& shape, std::uint64_t bytes) {
    const auto place = fmt::format("{}: '{}'", where_, path);
    const Handle list(H5Dget_create_plist(dataset));
    const auto layout = H5Pget_layout(list);
    shard::require(layout != H5D_VIRTUAL && H5Pget_external_count(list) <= 0, Code::BadFormat, [&] { return place + " is kept in other files"; });
    if (layout == H5D_CHUNKED && bytes > 0) {
      ChunkedLayout chunks{shape, {}, size_of(type.dtype), type.big_endian, {}, fill_of(dataset, list, type), place};
      std::vector<hsize_t> sizes(shape.size());
      shard::require(H5Pget_chunk(list, static_cast<int>(sizes.size()), sizes.data()) == static_cast<int>(sizes.size()), Code::BadFormat, [&] { return place + " has chunks of another rank"; });
      for (const auto size : sizes) {
        shard::require(size > 0 && size <= kLargestChunk, Code::BadFormat, [&] { return place + " has chunks beyond reason"; });
        chunks.chunk.push_back(static_cast<Index>(size));
      }
      shard::require(static_cast<std::uint64_t>(shard::volume(chunks.chunk)) * chunks.item <= kLargestChunk, Code::BadFormat, [&] { return place + " has chunks beyond reason"; });
      std::uint64_t there = 1;
      for (std::size_t d = 0; d < shape.size(); ++d) there *= static_cast<std::uint64_t>((shape[d] - 1) / chunks.chunk[d] + 1);
      if (bytes > kLargestSmall || there > kMostUnwritten) {
        const Handle space(H5Dget_space(dataset));
        hsize_t written = 0;
        shard::require(H5Dget_num_chunks(dataset, space, &written) >= 0 && written >= there / 2, Code::BadFormat, [&] { return place + fmt::format(" has {} chunks, of which {} were ever written", there, written); });
      }
      for (int i = 0; i < H5Pget_nfilters(list); ++i) {
        unsigned flags = 0, config = 0;
        std::size_t values = 8;
        unsigned parameters[8] = {};
        const auto number = H5Pget_filter2(list, static_cast<unsigned>(i), &flags, &values, parameters, 0, nullptr, &config);
        chunks.filters.push_back({static_cast<int>(number), number == H5Z_FILTER_SHUFFLE && values > 0 && parameters[0] > 0 && parameters[0] <= 64 ? parameters[0] : chunks.item});
      }
      check_filters(chunks.filters, place);
      return computed_stream(std::make_shared<const ChunkedBytes>(std::move(dataset), next_++, std::move(chunks), cache_), bytes);
    }
    const auto offset = layout == H5D_CONTIGUOUS ? H5Dget_offset(dataset) : HADDR_UNDEF;
    if (offset != HADDR_UNDEF && !type.big_endian) {
      const auto file = out_.files->get(0);
      shard::require(offset <= file->size() && bytes <= file->size() - offset, Code::BadFormat, [&] { return place + " reaches past the end of the file"; });
      out_.stored.streams.push_back({0, offset, bytes, std::nullopt, false});
      return static_cast<std::uint32_t>(out_.stored.streams.size() - 1);
    }
    // Compact, never written, or of the other byte order: few and small in a checkpoint.
    shard::require(bytes <= kLargestSmall, Code::BadFormat, [&] { return place + fmt::format(" of {} bytes is stored in a way that is only supported for small data", bytes); });
    auto held = std::make_shared<Held>();
    held->bytes.resize(bytes);
    const Handle memory(H5Dget_type(dataset));
    if (bytes > 0)
      shard::require(H5Dread(dataset, memory, H5S_ALL, H5S_ALL, H5P_DEFAULT, held->bytes.data()) >= 0, Code::BadFormat, [&] { return place + " cannot be read"; });
    const auto item = size_of(type.dtype);
    if (type.big_endian)
      for (std::uint64_t i = 0; i < bytes; i += item) std::reverse(held->bytes.begin() + static_cast<std::ptrdiff_t>(i), held->bytes.begin() + static_cast<std::ptrdiff_t>(i + item));
    return computed_stream(std::move(held), bytes);
  }

  static std::vector<std::byte> fill_of(hid_t dataset, hid_t list, const Type& type) {
    std::vector<std::byte> fill(size_of(type.dtype));
    const Handle stored(H5Dget_type(dataset));
    H5D_fill_value_t defined = H5D_FILL_VALUE_UNDEFINED;
    if (H5Pfill_value_defined(list, &defined) >= 0 && defined == H5D_FILL_VALUE_USER_DEFINED) H5Pget_fill_value(list, stored, fill.data());
    if (type.big_endian) std::reverse(fill.begin(), fill.end());
    return fill;
  }

  void add_reserved(hid_t dataset, const std::string& name) {
    const auto shape = shape_of(dataset, name);
    const auto size = static_cast<std::uint64_t>(shard::volume(shape));
    const Handle type(H5Dget_type(dataset));
    shard::require(shape.size() == 1 && size <= kLargestSmall && H5Tget_size(type) == 1, Code::BadFormat, [&] { return fmt::format("{}: '{}' should be a row of bytes", where_, name); });
    std::vector<std::byte> bytes(size);
    if (size > 0)
      shard::require(H5Dread(dataset, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, bytes.data()) >= 0, Code::BadFormat, [&] { return fmt::format("{}: '{}' cannot be read, or its checksum does not match", where_, name); });
    if (name == "common.pkl") common_ = std::move(bytes);
    else if (name == "config.json") config_.assign(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  }

  const OpenOptions& options_;
  Checkpoint out_;
  std::string where_, config_;
  Handle file_;
  std::vector<std::string> datasets_, soft_links_;
  std::set<haddr_t> groups_;
  std::unique_ptr<shard::Error> failed_;
  std::optional<std::vector<std::byte>> common_;
  std::shared_ptr<ChunkCache> cache_ = std::make_shared<ChunkCache>();
  std::uint64_t next_ = 0;
};

}  // namespace

bool matches(const fs::path& path) {
  const auto file = file_of(path);
  return fs::is_regular_file(file) && has_signature(file);
}

Checkpoint open(const fs::path& path, const OpenOptions& options) { return Reader(path, options).finish(); }

}  // namespace formats::hdf5
