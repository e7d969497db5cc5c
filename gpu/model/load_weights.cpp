// All ranks know from the plan alone which boxes travel in which round. Two batches take turns, so that packing one overlaps sending the other.
#include "gpu/model/load_weights.h"

#include "libshard/error.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>

namespace gpu {
namespace {

using shard::Box;

/// Rows of a use, as many as fit a batch however many ranks want them.
struct Piece {
  std::size_t use;
  Box box;                                     // of the whole weight
  int reader;
};
using Round = std::vector<Piece>;

/// A box of a piece, and the ranks that hold it.
struct Packet {
  Box box;
  std::size_t bytes;
  std::vector<int> ranks;
};

std::size_t aligned(std::size_t bytes) { return (bytes + 255) / 256 * 256; }

class Loader {
 public:
  Loader(lm::WeightStream& stream, const lm::StagePlan& plan, int rank, Resident& to, Communicator* peers, StreamView on, std::size_t batch)
      : stream_(stream), plan_(plan), rank_(rank), to_(to), peers_(peers), on_(on), batch_(batch) {
    for (int r = 0; r < static_cast<int>(plan.parts.size()); ++r)
      if (peers || r == rank) ranks_.push_back(r);
  }
  ~Loader() {
    try {
      gpu::wait(on_);  // it reads the batches
    } catch (...) {  // told by the next call on the stream
    }
  }

  void run() {
    const auto all = rounds();
    std::size_t pinned = 0, sent = 0;          // what the largest batch takes
    for (const auto& round : all) {
      std::size_t bytes = 0;
      bool sends = false;
      for (const auto& piece : round)
        if (piece.reader == rank_)
          for (const auto& packet : packets(piece)) bytes += aligned(packet.bytes), sends = sends || must_stage(packet);
      pinned = std::max(pinned, bytes);
      if (sends) sent = std::max(sent, bytes);
    }
    for (auto& slot : slots_) slot.pinned = PinnedBuffer(pinned), slot.device = DeviceBuffer(sent);
    for (std::size_t k = 0; k < all.size(); ++k) go(all[k], slots_[k % 2]);
    peers_ ? peers_->wait(on_) : gpu::wait(on_);
  }

 private:
  struct Slot {
    PinnedBuffer pinned;
    DeviceBuffer device;
    Event sent;
  };
  using Transfer = Communicator::Transfer;

  /// Every reader fills its batches in the order of its uses; round k is the k-th batch of each.
  std::vector<Round> rounds() const {
    std::vector<Round> out;
    std::vector<std::pair<std::size_t, std::size_t>> filled(plan_.parts.size());  // by reader: its round, and the bytes in it
    for (std::size_t u = 0; u < plan_.uses.size(); ++u) {
      const auto& use = plan_.uses[u];
      const auto [all, columns] = stream_.source().sides(use.name);
      const auto end = use.count < 0 ? all : use.lo + use.count;
      const auto row = std::max<std::size_t>(1, static_cast<std::size_t>(columns) * size_of(stream_.source().type_of(use.name)));
      const auto at_once = static_cast<lm::Index>(std::max<std::size_t>(1, batch_ / row / ranks_.size()));
      for (auto lo = use.lo; lo < end; lo += at_once) {
        Piece piece{u, {{lo, 0}, {std::min(at_once, end - lo), columns}}, peers_ ? plan_.readers[u] : rank_};
        std::size_t bytes = 0;
        for (const auto& packet : packets(piece)) bytes += aligned(packet.bytes);
        auto& [round, taken] = filled[static_cast<std::size_t>(piece.reader)];
        if (taken > 0 && taken + bytes > batch_) ++round, taken = 0;
        taken += bytes;
        if (out.size() <= round) out.resize(round + 1);
        out[round].push_back(std::move(piece));
      }
    }
    return out;
  }

  /// The reader's own first: equal boxes of others are sent from its place.
  std::vector<Packet> packets(const Piece& piece) const {
    std::vector<Packet> out;
    const auto& name = plan_.uses[piece.use].name;
    const auto add = [&](int rank) {
      const auto& parts = plan_.parts[static_cast<std::size_t>(rank)];
      const auto part = parts.find(name);
      const auto box = part == parts.end() ? std::nullopt : shard::intersect(piece.box, part->second.box);
      if (!box) return;
      const auto known = std::find_if(out.begin(), out.end(), [&](const Packet& one) { return one.box == *box; });
      if (known != out.end()) known->ranks.push_back(rank);
      else out.push_back({*box, static_cast<std::size_t>(shard::volume(box->size)) * size_of(part->second.type), {rank}});
    };
    add(piece.reader);
    for (const auto rank : ranks_)
      if (rank != piece.reader) add(rank);
    return out;
  }
  bool must_stage(const Packet& packet) const { return packet.ranks[0] != rank_; }

  void go(const Round& round, Slot& slot) {
    slot.sent.wait();
    std::vector<Transfer> transfers;
    std::size_t filled = 0;
    for (const auto& piece : round)
      for (const auto& packet : packets(piece))
        if (piece.reader == rank_) send(piece, packet, slot, std::exchange(filled, filled + aligned(packet.bytes)), transfers);
        else if (std::find(packet.ranks.begin(), packet.ranks.end(), rank_) != packet.ranks.end())
          transfers.push_back({Transfer::Way::Receive, piece.reader, place_of(piece, packet), packet.bytes});
    if (peers_) peers_->exchange(transfers, on_);
    slot.sent.record(on_);
  }

  void send(const Piece& piece, const Packet& packet, Slot& slot, std::size_t at, std::vector<Transfer>& transfers) {
    const auto& use = plan_.uses[piece.use];
    if (taken_use_ != piece.use) weight_ = stream_.take(use.name, use.lo), taken_use_ = piece.use;
    auto* const packed = slot.pinned.data() + at;
    const auto from = weight_.row_range(packet.box.lo[0] - use.lo, packet.box.size[0]).column_range(packet.box.lo[1], packet.box.size[1]);
    const auto row = packet.bytes / static_cast<std::size_t>(from.rows), pitch = static_cast<std::size_t>(from.stride) * size_of(from.dtype);
    if (row == pitch) std::memcpy(packed, from.data, packet.bytes);
    else
      for (std::size_t r = 0; r < static_cast<std::size_t>(from.rows); ++r) std::memcpy(packed + r * row, from.data + r * pitch, row);
    auto* const place = must_stage(packet) ? slot.device.data() + at : place_of(piece, packet);
    to_device(place, packed, packet.bytes, on_);
    for (const auto rank : packet.ranks)
      if (rank != rank_) transfers.push_back({Transfer::Way::Send, rank, place, packet.bytes});
  }

  std::byte* place_of(const Piece& piece, const Packet& packet) const {
    const auto& name = plan_.uses[piece.use].name;
    return to_.view(name).at(packet.box.lo[0] - to_.box(name).lo[0], 0);
  }

  lm::WeightStream& stream_;
  const lm::StagePlan& plan_;
  int rank_;
  Resident& to_;
  Communicator* peers_;
  StreamView on_;
  std::size_t batch_;
  std::vector<int> ranks_;                     ///< that get boxes from here
  Slot slots_[2];
  std::optional<std::size_t> taken_use_;
  lm::Weight weight_;
};

}  // namespace

void load_weights(lm::WeightStream& stream, const lm::StagePlan& plan, int rank, Resident& to, Communicator* peers, StreamView on, std::size_t batch) {
  Loader(stream, plan, rank, to, peers, on, batch).run();
}

}  // namespace gpu
