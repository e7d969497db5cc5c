// What a device's links and the kernels of resharding reach, each beside the device's own copy in the same run.
// usage: gpu_reshard [--mib N] [--rounds N] [--device N]     prints one JSON object; rates in bytes per second, best of the rounds
#include "gpu/reshard/boxes.h"
#include "gpu/reshard/crc32.h"
#include "gpu/reshard/numbers.h"
#include "libshard/error.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

namespace {

using gpu::reshard::Box;
using gpu::reshard::BoxList;
using shard::DType;
using shard::Index;

struct Ask {
  std::uint64_t mib = 1024;
  int rounds = 10, device = 0;
};

Ask read_arguments(int argc, char** argv) {
  Ask out;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string name = argv[i];
    if (name == "--mib") out.mib = std::stoull(argv[i + 1]);
    else if (name == "--rounds") out.rounds = std::stoi(argv[i + 1]);
    else if (name == "--device") out.device = std::stoi(argv[i + 1]);
    else shard::fail(shard::Code::Usage, "{}: --mib, --rounds and --device are known", name);
  }
  shard::require(argc % 2 == 1 && out.mib > 0 && out.mib < 2048 && out.rounds > 0, shard::Code::Usage, [] { return "usage: gpu_reshard [--mib 1..2047] [--rounds N] [--device N]"; });
  return out;
}

class Bench {
 public:
  explicit Bench(const Ask& ask)
      : rounds_(ask.rounds), bytes_(ask.mib << 20), from_(bytes_), to_(bytes_), table_(4 << 20), host_(bytes_), pinned_table_(4 << 20), sums_(stream_) {
    std::memset(host_.data(), 0x3c, bytes_);
    gpu::to_device(from_.data(), host_.data(), bytes_, stream_);
    stream_.wait();
  }

  /// Bytes that `work` moves, by the device's clock.
  double rate(std::uint64_t bytes, const std::function<void()>& work) {
    double best = 0;
    for (int round = 0; round <= rounds_; ++round) {  // the first one warms up
      gpu::Event start, end;
      start.record(stream_);
      work();
      end.record(stream_);
      end.wait();
      if (round > 0) best = std::max(best, static_cast<double>(bytes) / (std::max(1e-3, static_cast<double>(end.since(start))) / 1e3));
    }
    return best;
  }

  void run(const std::string& device) {
    const auto copy = rate(2 * bytes_, [&] { gpu::on_device(to_.data(), from_.data(), bytes_, stream_); });
    const auto up = rate(bytes_, [&] { gpu::to_device(from_.data(), host_.data(), bytes_, stream_); });
    const auto down = rate(bytes_, [&] { gpu::to_host(host_.data(), from_.data(), bytes_, stream_); });
    fmt::print("{{\"device\": \"{}\", \"bytes\": {}, \"copy\": {:.0f}, \"up\": {:.0f}, \"down\": {:.0f}, \"kernels\": {{", device, bytes_, copy, up, down);
    bool first = true;
    const auto told = [&](const std::string& name, double found) {
      fmt::print("{}\"{}\": {{\"rate\": {:.0f}, \"of_copy\": {:.3f}}}", first ? "" : ", ", name, found, found / copy);
      first = false;
    };
    const auto boxes = [&](const std::string& name, const std::vector<Box>& list) { told(name, boxes_rate(list)); };
    // A weight of `columns` bf16 columns; as many rows as fit.
    const Index columns = std::min<Index>(4096, static_cast<Index>(bytes_ / 2 / 64)), rows = static_cast<Index>(bytes_) / 2 / columns / 64 * 64, ways = 8;
    std::vector<Box> split, joined;
    for (Index t = 0; t < ways; ++t) {
      const auto part = static_cast<std::uint64_t>(2 * columns / ways * t), place = static_cast<std::uint64_t>(2 * rows * columns / ways * t);
      split.push_back({part, place, {{rows, 2 * columns, 2 * columns / ways}, {columns / ways, 2, 2}}, DType::BF16, DType::BF16});
      joined.push_back({place, part, {{rows, 2 * columns / ways, 2 * columns}, {columns / ways, 2, 2}}, DType::BF16, DType::BF16});
    }
    boxes("columns split in 8", split);
    boxes("columns joined from 8", joined);
    std::vector<Box> by_rows;
    for (Index t = 0; t < ways; ++t)
      by_rows.push_back({static_cast<std::uint64_t>(2 * columns * (rows / ways) * t), static_cast<std::uint64_t>(2 * columns * (rows / ways) * (ways - 1 - t)), {{rows / ways * columns, 2, 2}}, DType::BF16, DType::BF16});
    boxes("rows split in 8", by_rows);
    boxes("q, k, v interleaved", interleaved(rows / 6 / 8 * 8, columns));
    const auto transpose = [&](DType from, DType to) {
      const auto item = static_cast<Index>(size_of(from)), wide = static_cast<Index>(size_of(to)), count = rows * 2 / std::max(item, wide) / 64 * 64;
      boxes(from == to ? fmt::format("transpose of {}", name(from)) : fmt::format("transpose of {} to {}", name(from), name(to)),
            {{0, 0, {{columns, item, wide * count}, {count, item * columns, wide}}, from, to}});
    };
    transpose(DType::BF16, DType::BF16);
    transpose(DType::F32, DType::F32);
    transpose(DType::F8E4M3, DType::F8E4M3);
    const auto cast = [&](DType from, DType to) {
      const auto item = static_cast<Index>(size_of(from)), wide = static_cast<Index>(size_of(to));
      boxes(fmt::format("{} to {}", name(from), name(to)), {{0, 0, {{static_cast<Index>(bytes_) / std::max(item, wide), item, wide}}, from, to}});
    };
    for (const auto& [from, to] : {std::pair{DType::F32, DType::BF16}, {DType::BF16, DType::F32}, {DType::BF16, DType::F16}, {DType::F16, DType::BF16}, {DType::F32, DType::F16},
                                   {DType::F32, DType::F8E4M3}, {DType::F8E4M3, DType::F32}, {DType::BF16, DType::F8E4M3}, {DType::F8E4M3, DType::BF16}, {DType::F8E4M3, DType::F8E5M2}})
      cast(from, to);
    transpose(DType::F32, DType::BF16);
    transpose(DType::BF16, DType::F8E4M3);
    boxes("one row repeated", {{0, 0, {{rows, 0, 2 * columns}, {columns, 2, 2}}, DType::BF16, DType::BF16}});
    told("crc32", sums_rate());
    told("scan for what is not finite", scan_rate());
    fmt::print("}}}}\n");
  }

 private:
  /// Thirds of an image as q, k and v of grouped attention, to the order that Megatron keeps: each group's queries, key and value.
  static std::vector<Box> interleaved(Index head_rows, Index columns) {
    const Index row = 2 * columns, groups = 8, query = 4 * head_rows / groups * row, other = head_rows / groups * row, each = query + 2 * other;
    const auto box = [&](Index from, Index to, Index bytes) { return Box{static_cast<std::uint64_t>(from), static_cast<std::uint64_t>(to), {{groups, bytes, each}, {bytes / 2, 2, 2}}, DType::BF16, DType::BF16}; };
    return {box(0, 0, query), box(groups * query, query, other), box(groups * (query + other), query + other, other)};
  }

  /// Bytes read and written; what is read again and again counts once.
  double boxes_rate(const std::vector<Box>& boxes) {
    BoxList list;
    std::uint64_t moved = 0;
    for (const auto& box : boxes) {
      list.add(box);
      std::uint64_t read = size_of(box.from_type), written = size_of(box.to_type);
      for (const auto& dim : box.dims) {
        read *= dim.from ? static_cast<std::uint64_t>(dim.count) : 1;
        written *= static_cast<std::uint64_t>(dim.count);
      }
      moved += read + written;
    }
    list.store(pinned_table_.data());
    gpu::to_device(table_.data(), pinned_table_.data(), list.table_bytes(), stream_);
    return rate(moved, [&] { list.run(table_.data(), from_.data(), to_.data(), stream_); });
  }

  template <typename Piece>
  std::uint32_t pieces(std::uint32_t each) {
    auto* const list = reinterpret_cast<Piece*>(pinned_table_.data());
    std::uint32_t count = 0;
    for (std::uint64_t at = 0; at < bytes_; at += each) {
      list[count] = {};
      list[count].at = at;
      list[count].bytes = static_cast<std::uint32_t>(std::min<std::uint64_t>(each, bytes_ - at));
      if constexpr (std::is_same_v<Piece, gpu::reshard::ScanPiece>) list[count].dtype = DType::BF16;
      ++count;
    }
    gpu::to_device(table_.data(), pinned_table_.data(), count * sizeof(Piece), stream_);
    return count;
  }
  double sums_rate() {
    const auto count = pieces<gpu::reshard::CrcPiece>(gpu::reshard::kCrcPiece);
    return rate(bytes_, [&] {
      gpu::reshard::crc32_pieces(sums_, reinterpret_cast<gpu::reshard::CrcPiece*>(table_.data()), count, from_.data(), reinterpret_cast<std::uint32_t*>(to_.data()), stream_);
    });
  }
  double scan_rate() {
    const auto count = pieces<gpu::reshard::ScanPiece>(gpu::reshard::kScanPiece);
    gpu::set_bytes(to_.data(), 0, sizeof(gpu::reshard::ScanCounts), stream_);
    return rate(bytes_, [&] {
      gpu::reshard::count_nonfinite(reinterpret_cast<gpu::reshard::ScanPiece*>(table_.data()), count, from_.data(), reinterpret_cast<gpu::reshard::ScanCounts*>(to_.data()), stream_);
    });
  }

  int rounds_;
  std::uint64_t bytes_;
  gpu::DeviceBuffer from_, to_, table_;
  gpu::PinnedBuffer host_, pinned_table_;
  gpu::Stream stream_;
  gpu::reshard::CrcTables sums_;
};

}  // namespace

int main(int argc, char** argv) {
  try {
    const auto ask = read_arguments(argc, argv);
    const auto found = gpu::probe();
    shard::require(!found.devices.empty(), shard::Code::Device, [&] { return found.why; });
    gpu::use_device(ask.device);
    Bench(ask).run(gpu::device_info(ask.device).name);
    return 0;
  } catch (const shard::Error& error) {
    fmt::print(stderr, "gpu_reshard: {}\n", error.what());
    return static_cast<int>(error.code);
  }
}
