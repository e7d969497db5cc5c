// Host pages go through two pinned buffers, so that copying into one overlaps sending the other.
#include "gpu/model/load_weights.h"

#include "libshard/error.h"

#include <algorithm>
#include <cstring>

namespace gpu {
namespace {

class Uploads {
 public:
  explicit Uploads(StreamView on) : on_(on) {}
  ~Uploads() {
    try {
      gpu::wait(on_);
    } catch (...) {  // told by the next call on the stream
    }
  }
  /// The rows of `from` packed at `to`.
  void send(std::byte* to, const lm::Weight& from) {
    const auto row = static_cast<std::size_t>(from.columns) * size_of(from.dtype), pitch = static_cast<std::size_t>(from.stride) * size_of(from.dtype);
    if (row == pitch) return send(to, from.data, row * static_cast<std::size_t>(from.rows));
    const auto at_once = std::max<std::size_t>(1, kBytes / row);
    for (std::size_t at = 0, all = static_cast<std::size_t>(from.rows); at < all; at += at_once) {
      auto& slot = next();
      const auto count = std::min(at_once, all - at);
      for (std::size_t r = 0; r < count; ++r) std::memcpy(slot.memory.data() + r * row, from.data + (at + r) * pitch, row);
      go(slot, to + at * row, count * row);
    }
  }

 private:
  static constexpr std::size_t kBytes = 16 << 20;
  struct Slot {
    PinnedBuffer memory{kBytes};
    Event sent;
  };
  void send(std::byte* to, const std::byte* from, std::size_t bytes) {
    for (std::size_t at = 0; at < bytes; at += kBytes) {
      auto& slot = next();
      const auto part = std::min(bytes - at, kBytes);
      std::memcpy(slot.memory.data(), from + at, part);
      go(slot, to + at, part);
    }
  }
  Slot& next() {
    auto& slot = slots_[next_++ % 2];
    slot.sent.wait();
    return slot;
  }
  void go(Slot& slot, std::byte* to, std::size_t bytes) {
    to_device(to, slot.memory.data(), bytes, on_);
    slot.sent.record(on_);
  }

  StreamView on_;
  Slot slots_[2];
  std::size_t next_ = 0;
};

}  // namespace

void load_weights(lm::WeightStream& stream, const std::vector<lm::WeightUse>& uses, Resident& to, StreamView on) {
  Uploads uploads(on);
  for (const auto& use : uses) {
    const auto weight = stream.take(use.name, use.lo);
    if (!to.has(use.name)) continue;
    const auto& mine = to.box(use.name);
    const auto here = shard::intersect({{use.lo, 0}, {weight.rows, weight.columns}}, mine);
    if (!here) continue;
    const auto into = to.view(use.name);
    shard::require(weight.dtype == into.type && here->size[1] == into.columns, shard::Code::Mismatch,
                   [&] { return fmt::format("{}: comes as rows of {}; {} were planned", use.name, weight.columns, into.columns); });
    uploads.send(into.at(here->lo[0] - mine.lo[0], 0), weight.row_range(here->lo[0] - use.lo, here->size[0]).column_range(here->lo[1], here->size[1]));
  }
  gpu::wait(on);
}

}  // namespace gpu
