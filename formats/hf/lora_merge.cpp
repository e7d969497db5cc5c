// Merging: weight + scaling · (B · A), element by element when it is read. Sums run over the rank in its order, in f32 with a
// product and its sum in two roundings, so that the bytes depend neither on threads nor on how a weight is cut.
#include "formats/hf/computed.h"
#include "formats/hf/lora.h"
#include "formats/kernels.h"
#include "libshard/error.h"
#include "libshard/numeric.h"

#include <algorithm>
#include <mutex>
#include <set>

namespace formats::hf {
namespace {

using shard::Code;
using shard::DType;
using shard::Index;
using Floats = std::vector<float>;

constexpr std::uint64_t kTile = 4 << 20;         // floats of a factor at a time
constexpr std::uint64_t kMostKept = 16 << 20;    // floats of all tiles that are kept
constexpr std::uint64_t kPiece = 64 << 10;       // elements read at a time
constexpr std::uint64_t kBlock = 32 << 10;       // elements that ComputedElements asks for at a time

/// A factor in its file, read as floats. Keeps the adapter's files open to reading.
struct Factor {
  std::shared_ptr<const FilePool> files;
  StoredBytes bytes;
  DType dtype;
  std::uint64_t columns;

  void read(std::uint64_t first, std::span<float> out) const {
    std::vector<std::byte> raw(std::min<std::uint64_t>(out.size(), kPiece) * size_of(dtype));
    while (!out.empty()) {
      const auto count = std::min<std::uint64_t>(out.size(), kPiece);
      const auto piece = std::span(raw).first(count * size_of(dtype));
      bytes.read(first * size_of(dtype), piece);
      shard::cast(piece, dtype, std::as_writable_bytes(out.first(count)), DType::F32);
      first += count;
      out = out.subspan(count);
    }
  }

  /// Rows [row, row + count) of columns [column, column + width), as rows.
  void box(std::uint64_t row, std::uint64_t count, std::uint64_t column, std::uint64_t width, std::span<float> out) const {
    if (width == columns) return read(row * columns, out);
    for (std::uint64_t i = 0; i < count; ++i) read((row + i) * columns + column, out.subspan(i * width, width));
  }

  /// The same box as columns: out[column · count + row].
  void turned(std::uint64_t row, std::uint64_t count, std::uint64_t column, std::uint64_t width, std::span<float> out) const {
    const auto rows_at_once = std::clamp<std::uint64_t>(kPiece / width, 1, count);
    Floats rows(rows_at_once * width);
    for (std::uint64_t i = 0; i < count; i += rows_at_once) {
      const auto here = std::min(rows_at_once, count - i);
      box(row + i, here, column, width, std::span(rows).first(here * width));
      for (std::uint64_t r = 0; r < here; ++r)
        for (std::uint64_t c = 0; c < width; ++c) out[c * count + i + r] = rows[r * width + c];
    }
  }
};

/// The factor tiles that were used last, shared by all weights of an adapter: every block of a weight needs them again.
class Tiles {
 public:
  using Key = std::pair<const void*, std::uint64_t>;

  template <typename Make>
  std::shared_ptr<const Floats> get(const Key& key, Make&& make) {
    {
      const std::lock_guard lock(mutex_);
      const auto found = std::find_if(kept_.begin(), kept_.end(), [&](const auto& one) { return one.first == key; });
      if (found != kept_.end()) {
        std::rotate(found, found + 1, kept_.end());
        return kept_.back().second;
      }
    }
    auto made = std::make_shared<const Floats>(make());
    const std::lock_guard lock(mutex_);
    kept_.emplace_back(key, made);
    floats_ += made->size();
    while (floats_ > kMostKept && kept_.size() > 1) {
      floats_ -= kept_.front().second->size();
      kept_.erase(kept_.begin());
    }
    return made;
  }

 private:
  std::mutex mutex_;
  std::vector<std::pair<Key, std::shared_ptr<const Floats>>> kept_;  ///< used last: at the end
  std::uint64_t floats_ = 0;
};

/// sum[y] += left[k] · right[k · pitch + y] for k from 0 on: the order is the same whatever the range of y.
void add_products(std::span<const float> left, const float* right, std::uint64_t pitch, std::span<float> sum) {
  float* __restrict out = sum.data();
  std::size_t k = 0;
  for (; k + 4 <= left.size(); k += 4, right += 4 * pitch) {
    const float a = left[k], b = left[k + 1], c = left[k + 2], d = left[k + 3];
    const float *__restrict p = right, *__restrict q = right + pitch, *__restrict r = right + 2 * pitch, *__restrict s = right + 3 * pitch;
    for (std::size_t y = 0; y < sum.size(); ++y) {
      float value = out[y];
      value += a * p[y];
      value += b * q[y];
      value += c * r[y];
      value += d * s[y];
      out[y] = value;
    }
  }
  for (; k < left.size(); ++k, right += pitch)
    for (std::size_t y = 0; y < sum.size(); ++y) out[y] += left[k] * right[y];
}

/// A weight with its factors. As it lies, its rows are those of the left factor and its columns those of the right one: B and A,
/// or A and B turned where the weight is stored as in | out.
class Merged final : public ComputedElements {
 public:
  Merged(DType dtype, StoredBytes base, Factor a, Factor b, bool transposed, double scaling, std::uint64_t rows, std::uint64_t columns, std::shared_ptr<Tiles> tiles)
      : ComputedElements(dtype, rows * columns), dtype_(dtype), base_(base), a_(std::move(a)), b_(std::move(b)), transposed_(transposed), scaling_(static_cast<float>(scaling)),
        rank_(b_.columns), columns_(columns), tiles_(std::move(tiles)) {}

 protected:
  void compute(std::uint64_t first, std::span<float> out) const override {
    const auto begin = first / columns_, end = (first + out.size() - 1) / columns_ + 1;
    const auto depth = std::clamp<std::uint64_t>(kTile / std::max(columns_, kBlock / columns_ + 2), 1, rank_);  // the same for every block
    Floats sum(out.size()), left((end - begin) * std::min(depth, rank_));
    for (std::uint64_t k = 0; k < rank_; k += depth) {
      const auto here = std::min(depth, rank_ - k);
      const auto right = tiles_->get({this, k}, [&] { return right_tile(k, here); });
      const auto lefts = std::span(left).first((end - begin) * here);
      if (transposed_) a_.turned(k, here, begin, end - begin, lefts);
      else b_.box(begin, end - begin, k, here, lefts);
      for (std::uint64_t at = 0; at < out.size();) {
        const auto row = (first + at) / columns_, column = (first + at) % columns_;
        const auto count = std::min<std::uint64_t>(columns_ - column, out.size() - at);
        add_products(lefts.subspan((row - begin) * here, here), right->data() + column, columns_, std::span(sum).subspan(at, count));
        at += count;
      }
    }
    std::vector<std::byte> raw(out.size() * size_of(dtype_));
    base_.read(first * size_of(dtype_), raw);
    shard::cast(raw, dtype_, std::as_writable_bytes(out), DType::F32);
    for (std::size_t i = 0; i < out.size(); ++i) out[i] += scaling_ * sum[i];
  }

 private:
  Floats right_tile(std::uint64_t k, std::uint64_t depth) const {
    Floats out(depth * columns_);
    if (transposed_) b_.turned(0, columns_, k, depth, out);
    else a_.box(k, depth, 0, columns_, out);
    return out;
  }

  DType dtype_;
  StoredBytes base_;
  Factor a_, b_;
  bool transposed_;
  float scaling_;
  std::uint64_t rank_, columns_;
  std::shared_ptr<Tiles> tiles_;
};

/// A tensor of the adapter in the place, and the type, of the base's.
class Replaced final : public ComputedElements {
 public:
  Replaced(DType dtype, Factor by, std::uint64_t count) : ComputedElements(dtype, count), by_(std::move(by)) {}

 protected:
  void compute(std::uint64_t first, std::span<float> out) const override { by_.read(first, out); }

 private:
  Factor by_;
};

bool plain_number(DType dtype) { return dtype == DType::F32 || dtype == DType::BF16 || dtype == DType::F16; }

class Merge {
 public:
  Merge(Checkpoint& base, const Checkpoint& adapter, const Family& family, const std::vector<shard::Row>& rows) : base_(base), adapter_(adapter), family_(family), table_(rows, "h") {}

  void run() {
    check_sums();
    for (const auto& [name, key] : adapter_.adapter->replaced) replace(name, key);
    for (const auto& module : adapter_.adapter->modules) add(module);
    check_tie();
  }

 private:
  /// What a pickled adapter's zip recorded: later reads go past the sums of a conversion.
  void check_sums() const {
    std::vector<std::byte> piece(kPiece);
    for (const auto& stream : adapter_.stored.streams) {
      if (!stream.crc32) continue;
      std::uint32_t sum = 0;
      for (std::uint64_t at = 0; at < stream.size; at += kPiece) {
        const auto bytes = std::span(piece).first(std::min(kPiece, stream.size - at));
        adapter_.files->get(stream.file)->read(stream.offset + at, bytes);
        sum = kernels().combine(sum, kernels().crc32(bytes), bytes.size());
      }
      shard::require(sum == *stream.crc32, Code::BadFormat, [&] { return fmt::format("{}: CRC-32 is {:08x}; {:08x} is recorded", adapter_.path.string(), sum, *stream.crc32); });
    }
  }

  /// Older files leave the family's prefix out; PEFT's keys have it, for they are paths in the model.
  std::string key_of(const std::string& name) const {
    const auto& tensors = base_.stored.tensors;
    if (tensors.contains(name)) return name;
    if (!family_.prefix.empty() && name.starts_with(family_.prefix) && tensors.contains(name.substr(family_.prefix.size()))) return name.substr(family_.prefix.size());
    shard::fail(Code::Mismatch, "{}: the adapter changes it; {} does not hold it", name, base_.path.string());
  }

  Factor factor(const std::string& key) const {
    const auto& tensor = adapter_.stored.at(key);
    return {adapter_.files, bytes_of(adapter_, tensor), tensor.dtype, static_cast<std::uint64_t>(tensor.global_shape.empty() ? 1 : tensor.global_shape.back())};
  }

  const shard::ShardedTensor& target(const std::string& key) const {
    const auto& tensor = base_.stored.tensors.at(key);
    shard::require(plain_number(tensor.dtype), Code::BadFormat, [&] { return fmt::format("{}: is {}; an adapter merges into f32, bf16 and f16", key, shard::name(tensor.dtype)); });
    return tensor;
  }

  void put(const shard::ShardedTensor& old, std::shared_ptr<const ComputedElements> bytes) {
    const auto file = base_.stored.files[base_.stored.streams[old.shards.at(0).place.stream].file];
    place(base_, base_.stored, {old.key, old.dtype, old.global_shape, old.natural, {}, old.vocabulary}, std::move(bytes), file, shard::row_major(old.global_shape));
    changed_.insert(old.key);
  }

  void replace(const std::string& name, const std::string& key) {
    const auto& by = adapter_.stored.at(key);
    const auto& old = target(key_of(name));
    shard::require(shard::castable(by.dtype, old.dtype), Code::BadFormat, [&] { return fmt::format("{}: is {}; the base's is {}", key, shard::name(by.dtype), shard::name(old.dtype)); });
    shard::require(by.global_shape == old.global_shape, Code::Mismatch,
                   [&] { return fmt::format("{}: shape is {}; the base's is {}, and a vocabulary that grew has no rule yet", key, shard::to_string(by.global_shape), shard::to_string(old.global_shape)); });
    put(old, std::make_shared<const Replaced>(old.dtype, factor(key), static_cast<std::uint64_t>(shard::volume(old.global_shape))));
  }

  void add(const LoraModule& module) {
    const auto& old = target(key_of(module.name + ".weight"));
    const auto &a = adapter_.stored.at(module.a), &b = adapter_.stored.at(module.b);
    const bool transposed = module.embedding || lies_transposed(old);
    const auto in = a.global_shape[1], out = b.global_shape[0];
    const auto should = transposed ? shard::Shape{in, out} : shard::Shape{out, in};
    shard::require(old.global_shape == should, Code::Mismatch,
                   [&] { return fmt::format("{}: shape is {}; the adapter's factors give {}", old.key, shard::to_string(old.global_shape), shard::to_string(should)); });
    put(old, std::make_shared<const Merged>(old.dtype, bytes_of(base_, old), factor(module.a), factor(module.b), transposed, module.scaling, static_cast<std::uint64_t>(should[0]),
                                            static_cast<std::uint64_t>(should[1]), tiles_));
  }

  /// Whether the family stores this weight as in | out (GPT-2's Conv1D). Not what fan_in_fan_out says: PEFT sets that by the last
  /// module that it saw.
  bool lies_transposed(const shard::ShardedTensor& tensor) const {
    const auto match = table_.match(tensor.key, base_.params);
    if (!match || match->row->vocabulary || tensor.global_shape.size() != 2) return false;
    const auto sizes = shard::factors(*match->row, base_.params);
    if (sizes.stored() != tensor.global_shape) return false;  // found when the keys are translated
    const shard::Shard whole{shard::whole(tensor.global_shape), {0, 0, shard::row_major(tensor.global_shape)}, {}};
    const auto parts = logical_parts(*match->row, sizes, *match, base_.params);
    shard::ShardedTensor logical;
    add_logical(parts.at(0), sizes, whole, logical);
    return logical.shards.at(0).place.stride.back() != 1;
  }

  /// The head of a tied model is the embedding. An adapter that changes the embedding alone leaves the head as it was, so they
  /// would part; PEFT's own merge changes both, and its unmerged model one.
  void check_tie() const {
    if (!shard::holds("tied", base_.params)) return;
    bool embedding = false, head = false;
    for (const auto& [key, tensor] : base_.stored.tensors)
      if (const auto match = table_.match(key, base_.params); match && match->row->parts.size() == 1 && !match->row->copy) {
        embedding |= match->row->parts[0].name == "embedding.word.weight" && changed_.contains(key);
        head |= match->row->parts[0].name == "output.weight";
      }
    shard::require(!embedding || head, Code::BadFormat,
                   [&] { return fmt::format("{}: the adapter changes the embedding, to which the head is tied; what becomes of the head is not said", base_.path.string()); });
  }

  Checkpoint& base_;
  const Checkpoint& adapter_;
  const Family& family_;
  shard::Table table_;
  std::set<std::string> changed_;
  std::shared_ptr<Tiles> tiles_ = std::make_shared<Tiles>();
};

}  // namespace

void merge_adapter(Checkpoint& base, const Checkpoint& adapter, const Family& family, const std::vector<shard::Row>& rows) {
  refuse(adapter.findings);
  Merge(base, adapter, family, rows).run();
  base.files->also(adapter.files);
  base.notes.push_back(fmt::format("merged {}: {} modules, {} tensors replaced", adapter.path.string(), adapter.adapter->modules.size(), adapter.adapter->replaced.size()));
}

}  // namespace formats::hf
