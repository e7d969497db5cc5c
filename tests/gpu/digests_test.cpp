// Sums, scans and comparisons in device memory give the CPU's numbers.
#include "formats/crc32.h"
#include "gpu/reshard/crc32.h"
#include "gpu/reshard/numbers.h"

#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <random>

using shard::DType;
using Bytes = std::vector<std::byte>;

namespace {

std::mt19937_64 random_engine(21);
std::uint64_t below(std::uint64_t end) { return std::uniform_int_distribution<std::uint64_t>(0, end - 1)(random_engine); }

template <typename T>
gpu::DeviceBuffer uploaded(const std::vector<T>& values, gpu::StreamView on) {
  gpu::DeviceBuffer out(values.size() * sizeof(T) + 1);
  gpu::to_device(out.data(), values.data(), values.size() * sizeof(T), on);
  return out;
}

gpu::DeviceBuffer zeros(std::size_t bytes, gpu::StreamView on) {
  gpu::DeviceBuffer out(bytes);
  gpu::set_bytes(out.data(), 0, bytes, on);
  return out;
}

template <typename T>
std::vector<T> downloaded(const gpu::DeviceBuffer& from, std::size_t count, gpu::StreamView on) {
  std::vector<T> out(count);
  gpu::to_host(out.data(), from.data(), count * sizeof(T), on);
  gpu::wait(on);
  return out;
}

/// Pieces of one run, as blocks take them.
std::vector<gpu::reshard::ScanPiece> cut(std::size_t bytes, DType dtype, std::uint32_t result, std::uint64_t at) {
  std::vector<gpu::reshard::ScanPiece> out;
  for (std::size_t done = 0; done < bytes; done += gpu::reshard::kScanPiece)
    out.push_back({at + done, done / size_of(dtype), static_cast<std::uint32_t>(std::min<std::size_t>(gpu::reshard::kScanPiece, bytes - done)), result, dtype});
  return out;
}

constexpr DType kAll[] = {DType::F64, DType::F32, DType::F16, DType::BF16, DType::F8E4M3, DType::F8E5M2, DType::C64, DType::C128,
                          DType::I64, DType::I32, DType::I16, DType::I8, DType::U64, DType::U32, DType::U16, DType::U8, DType::Bool, DType::F8E8M0};

}  // namespace

TEST_CASE("sums of pieces of every alignment and many lengths are the CPU's") {
  gpu::Stream stream;
  Bytes bytes(300'000);
  for (auto& byte : bytes) byte = static_cast<std::byte>(below(256));
  std::vector<gpu::reshard::CrcPiece> pieces;
  const auto add = [&](std::uint64_t at, std::uint64_t size) { pieces.push_back({at, static_cast<std::uint32_t>(size)}); };
  for (std::uint64_t size : {1, 2, 15, 16, 17, 63, 64, 65, 16'383, 16'384, 16'385, 65'535, 65'536})
    for (std::uint64_t at = 0; at < 3; ++at) add(at * 5, size);
  for (int i = 0; i < 200; ++i) {
    const auto at = below(bytes.size() - 1), most = std::min<std::uint64_t>(bytes.size() - at, gpu::reshard::kCrcPiece);
    add(at, 1 + below(most));
  }
  add(7, 0);
  const gpu::reshard::CrcTables tables(stream);
  const auto base = uploaded(bytes, stream), list = uploaded(pieces, stream);
  const gpu::DeviceBuffer sums(pieces.size() * 4);
  gpu::reshard::crc32_pieces(tables, reinterpret_cast<const gpu::reshard::CrcPiece*>(list.data()), static_cast<std::uint32_t>(pieces.size()), base.data(),
                             reinterpret_cast<std::uint32_t*>(sums.data()), stream);
  const auto got = downloaded<std::uint32_t>(sums, pieces.size(), stream);
  for (std::size_t i = 0; i < pieces.size(); ++i) {
    CAPTURE(pieces[i].at);
    CAPTURE(pieces[i].bytes);
    REQUIRE(got[i] == formats::crc32(std::span(bytes).subspan(pieces[i].at, pieces[i].bytes)));
  }
}

TEST_CASE("what is not finite: counts and the first, of every type") {
  gpu::Stream stream;
  for (const auto dtype : kAll) {
    if (!is_floating(dtype) && dtype != DType::C64 && dtype != DType::C128) continue;
    for (const std::size_t elements : {std::size_t{1}, std::size_t{7}, std::size_t{5'000}, std::size_t{100'003}})
      for (const bool wild : {false, true}) {
        Bytes bytes(elements * size_of(dtype));
        for (auto& byte : bytes) byte = static_cast<std::byte>(wild ? below(256) : below(32));
        if (!wild && elements > 100) std::fill_n(bytes.end() - static_cast<std::ptrdiff_t>(33 * size_of(dtype)), 2 * size_of(dtype), std::byte{0x7f});
        const auto pieces = cut(bytes.size(), dtype, 1, 0);
        const auto base = uploaded(bytes, stream), list = uploaded(pieces, stream), results = zeros(2 * sizeof(gpu::reshard::ScanCounts), stream);
        gpu::reshard::count_nonfinite(reinterpret_cast<const gpu::reshard::ScanPiece*>(list.data()), static_cast<std::uint32_t>(pieces.size()), base.data(),
                                      reinterpret_cast<gpu::reshard::ScanCounts*>(results.data()), stream);
        const auto got = downloaded<gpu::reshard::ScanCounts>(results, 2, stream)[1].found();
        const auto expected = shard::count_nonfinite(bytes, dtype);
        CAPTURE(name(dtype));
        CAPTURE(elements);
        CHECK(got.nan == expected.nan);
        CHECK(got.inf == expected.inf);
        CHECK(got.first == expected.first);
      }
  }
}

TEST_CASE("differences: count, first, the largest by value and in steps, of every type") {
  gpu::Stream stream;
  for (const auto dtype : kAll)
    for (const std::size_t elements : {std::size_t{1}, std::size_t{9}, std::size_t{70'001}})
      for (int kind = 0; kind < 3; ++kind) {
        Bytes a(elements * size_of(dtype));
        for (auto& byte : a) byte = static_cast<std::byte>(below(256));
        auto b = a;
        if (kind == 1)
          for (int i = 0; i < 3; ++i) b[below(b.size())] ^= std::byte{1};
        if (kind == 2)
          for (auto& byte : b) byte = below(50) ? byte : static_cast<std::byte>(below(256));
        const auto pieces = cut(a.size(), dtype, 0, 0);
        const auto left = uploaded(a, stream), right = uploaded(b, stream), list = uploaded(pieces, stream), results = zeros(sizeof(gpu::reshard::CompareCounts), stream);
        gpu::reshard::compare(reinterpret_cast<const gpu::reshard::ScanPiece*>(list.data()), static_cast<std::uint32_t>(pieces.size()), left.data(), right.data(),
                              reinterpret_cast<gpu::reshard::CompareCounts*>(results.data()), stream);
        const auto got = downloaded<gpu::reshard::CompareCounts>(results, 1, stream)[0].found();
        const auto expected = shard::compare(a, b, dtype);
        CAPTURE(name(dtype));
        CAPTURE(elements);
        CAPTURE(kind);
        CHECK(got.count == expected.count);
        CHECK(got.first == expected.first);
        CHECK(got.max_ulp == expected.max_ulp);
        CHECK(got.max_abs == expected.max_abs);
        CHECK(got.max_rel == expected.max_rel);
      }
}
