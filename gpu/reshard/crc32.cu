// A block sums a piece in squares of 256 threads × 64 bytes. A thread's sum goes on from square to square as if the bytes of all others
// were zero; at the end each is moved to its place and all are added. Zeros before a piece change nothing, zeros behind it are divided out.
#include "gpu/reshard/crc32.h"

#include "gpu/kernel.h"
#include "gpu/reshard/elements.h"

#include <memory>

namespace gpu::reshard {
namespace {

constexpr unsigned kSumThreads = 256, kWords = 16, kSquare = kSumThreads * kWords * 4;

/// A sum moved on by a fixed number of bytes: four looks, one for each of its bytes.
struct Moved {
  std::uint32_t by[4][256];
};
struct Constants {
  Moved word, square;                  ///< by 4 bytes; by a square less what the thread itself reads
  std::uint32_t place[kSumThreads];    ///< by what the threads behind read
};

Moved moved(std::uint64_t bytes) {
  Moved out;
  const auto power = crc_power(8 * bytes);
  for (unsigned j = 0; j < 4; ++j)
    for (std::uint32_t v = 0; v < 256; ++v) out.by[j][v] = crc_product(v << 8 * j, power);
  return out;
}

GPU_CODE std::uint32_t move(const Moved& table, std::uint32_t sum) {
  return table.by[0][sum & 0xff] ^ table.by[1][sum >> 8 & 0xff] ^ table.by[2][sum >> 16 & 0xff] ^ table.by[3][sum >> 24];
}

struct SumPieces {
  static constexpr unsigned kThreads = kSumThreads, kPitch = kWords + 1;  // the pitch spreads threads over banks
  struct Shared {
    Moved word, square;
    std::uint32_t words[kThreads * kPitch], sums[kThreads];
  };
  struct Own {
    std::uint32_t sum;
  };
  const Constants* constants;
  const CrcPiece* pieces;
  const std::byte* base;
  std::uint32_t* out;

  /// 16 bytes at `at`; those outside [begin, end) are zero.
  GPU_CODE Wide sixteen(std::uint64_t at, std::uint64_t begin, std::uint64_t end) const {
    if (at >= begin && at + 16 <= end) return load_as<Wide>(base + at);
    Wide some{};
    for (unsigned i = 0; i < 16; ++i)
      if (at + i >= begin && at + i < end) some.word[i / 4] |= std::uint32_t{static_cast<std::uint8_t>(base[at + i])} << 8 * (i % 4);
    return some;
  }

  template <typename Block>
  GPU_CODE void operator()(Block& block) const {
    const auto piece = pieces[block.x()];
    const auto begin = piece.at, end = begin + piece.bytes, first = begin / 16 * 16;
    auto& shared = block.shared();
    block.each([&](unsigned thread, Own& own) {
      own.sum = 0;
      for (unsigned j = 0; j < 4; ++j) {
        shared.word.by[j][thread] = constants->word.by[j][thread];
        shared.square.by[j][thread] = constants->square.by[j][thread];
      }
    });
    auto at = first;
    for (; at < end; at += kSquare) {
      block.each([&](unsigned thread, Own&) {
        for (unsigned i = 0; i < kWords / 4; ++i) {
          const auto group = i * kThreads + thread;  // of 16 bytes; neighbours read neighbours
          const auto some = sixteen(at + 16 * group, begin, end);
          for (unsigned w = 0; w < 4; ++w) shared.words[(group * 4 + w) / kWords * kPitch + (group * 4 + w) % kWords] = some.word[w];
        }
      });
      block.each([&](unsigned thread, Own& own) {
        own.sum = move(shared.square, own.sum);
        for (unsigned w = 0; w < kWords; ++w) own.sum = move(shared.word, own.sum ^ shared.words[thread * kPitch + w]);
      });
    }
    block.each([&](unsigned thread, Own& own) { shared.sums[thread] = crc_product(own.sum, constants->place[thread]); });
    block.each([&](unsigned thread, Own& own) {
      own.sum = 0;
      if (thread < 16)
        for (unsigned i = 0; i < 16; ++i) own.sum ^= shared.sums[thread * 16 + i];
    });
    block.each([&](unsigned thread, Own& own) {
      if (thread < 16) shared.sums[thread] = own.sum;
    });
    block.each_apart([&](unsigned thread, Own&) {
      if (thread != 0) return;
      std::uint32_t sum = 0;
      for (unsigned i = 0; i < 16; ++i) sum ^= shared.sums[i];
      const auto behind = at - end;  // zeros that were summed too
      sum = crc_product(sum, crc_power(0xffffffffu - 8 * behind));
      out[block.x()] = ~(sum ^ crc_product(0xffffffff, crc_power(8 * std::uint64_t{piece.bytes})));
    });
  }
};

}  // namespace

CrcTables::CrcTables(StreamView on) : buffer_(sizeof(Constants)) {
  static const auto constants = [] {
    auto made = std::make_unique<Constants>();
    made->word = moved(4);
    made->square = moved(kSquare - 4 * kWords);
    for (unsigned thread = 0; thread < kSumThreads; ++thread) made->place[thread] = crc_power(std::uint64_t{8} * 4 * kWords * (kSumThreads - 1 - thread));
    return made;
  }();
  to_device(buffer_.data(), constants.get(), sizeof(Constants), on);
}

void crc32_pieces(const CrcTables& tables, const CrcPiece* pieces, std::uint32_t count, const std::byte* base, std::uint32_t* out, StreamView on) {
  launch(on, {count}, SumPieces{reinterpret_cast<const Constants*>(tables.data()), pieces, base, out});
}

}  // namespace gpu::reshard
