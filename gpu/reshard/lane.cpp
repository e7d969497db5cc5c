// Up, boxes, sums, down, in a stream's order; the host reads before and writes after.
#include "gpu/reshard/lane.h"

#include <algorithm>
#include <cstring>

namespace gpu::reshard {
namespace {

constexpr std::uint64_t kDirectRun = 64 << 10;  ///< shorter reads and writes are not worth a call past the host's memory
constexpr std::uint64_t kPage = 4096;           ///< what is written past the page cache covers whole ones

template <typename T>
T* at(std::byte* base, std::uint64_t offset) {
  return reinterpret_cast<T*>(base + offset);
}

/// Elements in pieces, counted into result `number`.
void cut(std::uint64_t at, std::uint64_t bytes, std::uint64_t first, shard::DType dtype, std::size_t number, std::vector<ScanPiece>& out) {
  for (std::uint64_t done = 0; done < bytes; done += kScanPiece)
    out.push_back({at + done, first + done / size_of(dtype), static_cast<std::uint32_t>(std::min<std::uint64_t>(kScanPiece, bytes - done)), static_cast<std::uint32_t>(number), dtype});
}

void cut(const Segment& run, std::vector<CrcPiece>& out) {
  for (std::uint64_t done = 0; done < run.bytes; done += kCrcPiece) out.push_back({run.at + done, static_cast<std::uint32_t>(std::min<std::uint64_t>(kCrcPiece, run.bytes - done))});
}

}  // namespace

Lane::Lane(std::uint64_t image, Shared& shared)
    : shared_(shared), in_(image), out_(image), table_(kTables), device_in_(image), device_out_(image), device_table_(kTables), crc_tables_(stream_) {
  if (!shared_.direct) return;
  shared_.direct->remember(device_in_.data(), image);
  shared_.direct->remember(device_out_.data(), image);
}

Lane::~Lane() {
  try {
    stream_.wait();  // after an error there may be work under way on what goes now
  } catch (...) {    // a lost device says so to whoever is told
  }
  if (!shared_.direct) return;
  shared_.direct->forget(device_in_.data());
  shared_.direct->forget(device_out_.data());
}

Lane::Layout Lane::lay_out() {
  const auto round = [](std::uint64_t bytes) { return (bytes + 15) / 16 * 16; };
  Layout out{};
  out.from_pieces = round(batch_.boxes.table_bytes());
  out.to_pieces = round(out.from_pieces + from_pieces_.size() * sizeof(CrcPiece));
  out.compared = round(out.to_pieces + to_pieces_.size() * sizeof(CrcPiece));
  out.from_scanned = round(out.compared + compared_.size() * sizeof(ScanPiece));
  out.to_scanned = round(out.from_scanned + from_scanned_.size() * sizeof(ScanPiece));
  out.sums = round(out.to_scanned + to_scanned_.size() * sizeof(ScanPiece));
  out.differences = round(out.sums + (from_pieces_.size() + to_pieces_.size()) * 4);
  out.counts = round(out.differences + batch_.compared.size() * sizeof(CompareCounts));
  out.bytes = round(out.counts + batch_.scanned.size() * sizeof(ScanCounts));
  return out;
}

bool Lane::read_directly() {
  if (!shared_.direct) return false;
  const auto& reader = shared_.source.reader();
  for (const auto& read : batch_.reads)
    if (read.stream >= shard::kMemoryStreams || read.bytes < kDirectRun || !reader.file_range(read.stream)) return false;
  for (const auto& read : batch_.reads) {
    const auto range = *reader.file_range(read.stream);
    if (!shared_.direct->read(range.descriptor, range.offset + read.offset, device_in_.data(), read.at, read.bytes)) return false;
  }
  for (const auto& read : batch_.reads) shared_.read_directly += read.bytes;
  return true;
}

void Lane::start(Batch& batch) {
  std::swap(batch_, batch);
  batch.clear();
  from_pieces_.clear();
  to_pieces_.clear();
  compared_.clear();
  from_scanned_.clear();
  to_scanned_.clear();
  for (const auto& run : batch_.sums)
    if (shared_.source.summed(run.stream)) cut(run, from_pieces_);
  for (const auto& run : batch_.straight)
    if (shared_.source.summed(run.read.stream) || target_summed(run.to_stream)) cut(run.read, from_pieces_);
  for (const auto& run : batch_.writes)
    if (run.bytes >= shard::kShortRun && target_summed(run.stream)) cut(run, to_pieces_);
  for (std::size_t i = 0; i < batch_.compared.size(); ++i) {
    const auto& one = batch_.compared[i];
    cut(0, one.bytes, one.first, one.dtype, i, compared_);
  }
  for (std::size_t i = 0; i < batch_.scanned.size(); ++i) {
    const auto& one = batch_.scanned[i];
    cut(one.at, one.bytes, 0, one.dtype, i, one.dims.empty() ? from_scanned_ : to_scanned_);
  }
  layout_ = lay_out();
  if (layout_.bytes > table_.size()) {
    table_ = PinnedBuffer(layout_.bytes);
    device_table_ = DeviceBuffer(layout_.bytes);
  }

  busy_ = true;
  direct_ = read_directly();
  if (!direct_) {
    for (const auto& read : batch_.reads) shared_.source.read(read.stream, read.offset, {in_.data() + read.at, static_cast<std::size_t>(read.bytes)});
    to_device(device_in_.data(), in_.data(), batch_.from_bytes, stream_);
  }
  batch_.boxes.store(table_.data());
  std::copy(from_pieces_.begin(), from_pieces_.end(), at<CrcPiece>(table_.data(), layout_.from_pieces));
  std::copy(to_pieces_.begin(), to_pieces_.end(), at<CrcPiece>(table_.data(), layout_.to_pieces));
  std::copy(compared_.begin(), compared_.end(), at<ScanPiece>(table_.data(), layout_.compared));
  std::copy(from_scanned_.begin(), from_scanned_.end(), at<ScanPiece>(table_.data(), layout_.from_scanned));
  std::copy(to_scanned_.begin(), to_scanned_.end(), at<ScanPiece>(table_.data(), layout_.to_scanned));
  std::memset(table_.data() + layout_.differences, 0, layout_.bytes - layout_.differences);
  if (layout_.bytes > 0) to_device(device_table_.data(), table_.data(), layout_.bytes, stream_);

  auto* const device = device_table_.data();
  auto* const sums = at<std::uint32_t>(device, layout_.sums);
  batch_.boxes.run(device, device_in_.data(), device_out_.data(), stream_);
  crc32_pieces(crc_tables_, at<CrcPiece>(device, layout_.from_pieces), static_cast<std::uint32_t>(from_pieces_.size()), device_in_.data(), sums, stream_);
  crc32_pieces(crc_tables_, at<CrcPiece>(device, layout_.to_pieces), static_cast<std::uint32_t>(to_pieces_.size()), device_out_.data(), sums + from_pieces_.size(), stream_);
  for (std::size_t i = 0, first = 0; i < batch_.compared.size(); ++i) {
    auto last = first;
    while (last < compared_.size() && compared_[last].result == i) ++last;
    compare(at<ScanPiece>(device, layout_.compared) + first, static_cast<std::uint32_t>(last - first), device_out_.data() + batch_.compared[i].a, device_out_.data() + batch_.compared[i].b,
            at<CompareCounts>(device, layout_.differences), stream_);
    first = last;
  }
  count_nonfinite(at<ScanPiece>(device, layout_.from_scanned), static_cast<std::uint32_t>(from_scanned_.size()), device_in_.data(), at<ScanCounts>(device, layout_.counts), stream_);
  count_nonfinite(at<ScanPiece>(device, layout_.to_scanned), static_cast<std::uint32_t>(to_scanned_.size()), device_out_.data(), at<ScanCounts>(device, layout_.counts), stream_);
  if (layout_.bytes > layout_.sums) to_host(table_.data() + layout_.sums, device + layout_.sums, layout_.bytes - layout_.sums, stream_);
  if (!batch_.writes.empty()) to_host(out_.data(), device_out_.data(), batch_.to_bytes, stream_);
  if (direct_ && !batch_.straight.empty()) to_host(in_.data(), device_in_.data(), batch_.from_bytes, stream_);
}

void Lane::hand_over_sums() {
  const auto* sum = at<const std::uint32_t>(table_.data(), layout_.sums);
  const auto each = [&](const Segment& run, auto&& add) {
    for (std::uint64_t done = 0; done < run.bytes; done += kCrcPiece) add(run.offset + done, std::min<std::uint64_t>(kCrcPiece, run.bytes - done), *sum++);
  };
  for (const auto& run : batch_.sums)
    if (shared_.source.summed(run.stream)) each(run, [&](std::uint64_t offset, std::uint64_t bytes, std::uint32_t crc) { shared_.source.add_sum(run.stream, offset, bytes, crc); });
  for (const auto& run : batch_.straight) {
    const bool known = shared_.source.summed(run.read.stream), summed = target_summed(run.to_stream);
    if (known || summed)
      each(run.read, [&](std::uint64_t offset, std::uint64_t bytes, std::uint32_t crc) {
        if (known) shared_.source.add_sum(run.read.stream, offset, bytes, crc);
        if (summed) shared_.target->add_sum(run.to_stream, run.to + (offset - run.read.offset), bytes, crc);
      });
  }
  for (const auto& run : batch_.writes)
    if (run.bytes >= shard::kShortRun && target_summed(run.stream))
      each(run, [&](std::uint64_t offset, std::uint64_t bytes, std::uint32_t crc) { shared_.target->add_sum(run.stream, offset, bytes, crc); });
}

void Lane::hand_over_counts() {
  const auto* difference = at<const CompareCounts>(table_.data(), layout_.differences);
  const std::lock_guard lock(shared_.mutex);
  for (const auto& one : batch_.compared) {
    const auto found = (difference++)->found();
    auto& sum_of_all = shared_.differences[one.comparison];
    if (found.count && (!sum_of_all.count || found.first < sum_of_all.first)) sum_of_all.first = found.first;
    sum_of_all.count += found.count;
    sum_of_all.max_ulp = std::max(sum_of_all.max_ulp, found.max_ulp);
  }
  const auto* counts = at<const ScanCounts>(table_.data(), layout_.counts);
  for (const auto& one : batch_.scanned) {
    auto found = (counts++)->found();
    found.first = one.dims.empty() ? one.before / size_of(one.dtype) + found.first : (one.before + target_offset(one.dims, one.extent, found.first)) / size_of(one.dtype);
    shard::add_counts(found, shared_.found[one.task]);
  }
}

bool Lane::write_directly(const Segment& segment, const std::byte* image) {
  if (!shared_.direct || segment.bytes < kDirectRun) return false;
  const auto range = shared_.target->writer().file_range(segment.stream);
  if (!range || (range->offset + segment.offset) % kPage != 0 || segment.bytes % kPage != 0) return false;
  if (!shared_.direct->write(range->descriptor, range->offset + segment.offset, image, segment.at, segment.bytes)) return false;
  shared_.target->add_written(segment.bytes);
  shared_.written_directly += segment.bytes;
  return true;
}

std::uint64_t Lane::finish() {
  if (!std::exchange(busy_, false)) return 0;
  stream_.wait();
  hand_over_sums();
  hand_over_counts();
  const auto put = [&](const Segment& run, const std::byte* device, const std::byte* host) {
    if (!write_directly(run, device)) shared_.target->write(run.stream, run.offset, {host + run.at, static_cast<std::size_t>(run.bytes)});
    shared_.through_device += run.bytes;
  };
  for (const auto& run : batch_.writes) put(run, device_out_.data(), out_.data());
  for (const auto& run : batch_.straight) put({run.to_stream, run.to, run.read.bytes, run.read.at}, device_in_.data(), in_.data());
  return batch_.moved;
}

}  // namespace gpu::reshard
