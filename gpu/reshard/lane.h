// One batch under way on a device: its pinned and device buffers and its stream.
#pragma once

#include "gpu/reshard/batches.h"
#include "gpu/reshard/crc32.h"
#include "gpu/reshard/numbers.h"
#include "gpu/storage.h"
#include "libshard/source.h"
#include "libshard/target.h"

#include <atomic>
#include <mutex>

namespace gpu::reshard {

/// What all lanes of an execution share.
struct Shared {
  shard::SummedSource& source;
  shard::SummedTarget* target;                   ///< null: nothing is written
  DirectStorage* direct;                         ///< null: none
  std::vector<shard::Difference> differences;    ///< by comparison
  std::vector<shard::NonFinite> found;           ///< by task of a scan
  std::mutex mutex;                              ///< of both
  std::atomic<std::uint64_t> through_device = 0, read_directly = 0, written_directly = 0;
};

class Lane {
 public:
  Lane(std::uint64_t image, Shared& shared);
  ~Lane();
  Lane(const Lane&) = delete;
  Lane& operator=(const Lane&) = delete;
  /// Reads the batch's bytes and leaves its work to the device; the batch is taken.
  void start(Batch& batch);
  /// Waits, takes the sums, and writes; the source bytes that are done come back. Nothing where nothing was started.
  std::uint64_t finish();

  static constexpr std::uint64_t kTables = 256 << 10;  ///< boxes and pieces up, sums down; they grow where a batch needs it
  static constexpr std::uint64_t kConstants = 16 << 10;  ///< of sums, whole pages
  static std::uint64_t pinned_memory(std::uint64_t image) { return 2 * image + kTables; }
  static std::uint64_t device_memory(std::uint64_t image) { return 2 * image + kTables + kConstants; }

 private:
  /// Where lists lie in the table: boxes, pieces of both images to be summed, compared and scanned, then what comes down.
  struct Layout {
    std::uint64_t from_pieces, to_pieces, compared, from_scanned, to_scanned, sums, differences, counts, bytes;
  };
  Layout lay_out();
  bool read_directly();
  bool write_directly(const Segment& segment, const std::byte* image);
  bool target_summed(std::uint32_t stream) const { return shared_.target->summed(stream); }
  void hand_over_sums();
  void hand_over_counts();

  Shared& shared_;
  PinnedBuffer in_, out_, table_;
  DeviceBuffer device_in_, device_out_, device_table_;
  Batch batch_;
  std::vector<CrcPiece> from_pieces_, to_pieces_;
  std::vector<ScanPiece> compared_, from_scanned_, to_scanned_;
  Layout layout_{};
  bool busy_ = false, direct_ = false;
  Stream stream_;
  CrcTables crc_tables_;
};

}  // namespace gpu::reshard
