// Filters run forwards when written and backwards when read, as H5Zpublic.h numbers them.
#include "formats/hdf5/chunk_filters.h"

#include "libshard/error.h"

#include <zlib.h>
#include <zstd.h>

#include <algorithm>
#include <bit>
#include <cstring>

namespace formats::hdf5 {
namespace {

using shard::Code;
using Bytes = std::vector<std::byte>;

/// H5_checksum_fletcher32: 16-bit big-endian words, sums modulo 65535.
std::uint32_t fletcher32(std::span<const std::byte> bytes) {
  std::uint32_t a = 0, b = 0;
  const auto fold = [&] {
    a = (a & 0xffff) + (a >> 16);
    b = (b & 0xffff) + (b >> 16);
  };
  std::size_t at = 0;
  const auto even = bytes.size() & ~std::size_t{1};
  while (at < even) {
    const auto stop = std::min(even, at + 720);
    for (; at < stop; at += 2) {
      a += static_cast<std::uint32_t>(bytes[at]) << 8 | static_cast<std::uint32_t>(bytes[at + 1]);
      b += a;
    }
    fold();
  }
  if (at < bytes.size()) {
    a += static_cast<std::uint32_t>(bytes[at]) << 8;
    b += a;
    fold();
  }
  fold();
  return b << 16 | a;
}

Bytes inflate_all(const Bytes& in, std::uint64_t size, const std::string& where) {
  Bytes out(size);
  auto length = static_cast<uLongf>(size);
  const int status = ::uncompress(reinterpret_cast<Bytef*>(out.data()), &length, reinterpret_cast<const Bytef*>(in.data()), static_cast<uLong>(in.size()));
  shard::require(status == Z_OK && length == size, Code::BadFormat, [&] { return fmt::format("{}: a deflated chunk cannot be read", where); });
  return out;
}

Bytes unshuffle(const Bytes& in, std::size_t item) {
  if (item <= 1) return in;
  Bytes out(in.size());
  const auto count = in.size() / item;
  for (std::size_t b = 0; b < item; ++b)
    for (std::size_t i = 0; i < count; ++i) out[i * item + b] = in[b * count + i];
  std::copy(in.begin() + static_cast<std::ptrdiff_t>(count * item), in.end(), out.begin() + static_cast<std::ptrdiff_t>(count * item));
  return out;
}

}  // namespace

void check_filters(const std::vector<Filter>& filters, const std::string& where) {
  for (const auto& filter : filters)
    shard::require(filter.number >= 1 && (filter.number <= 3 || filter.number == 32015), Code::BadFormat,
                   [&] { return fmt::format("{}: HDF5 filter {} is not supported; deflate, shuffle, Fletcher-32 and zstd (32015) are", where, filter.number); });
}

Bytes unpack(Bytes stored, const std::vector<Filter>& filters, std::uint32_t mask, std::uint64_t size, const std::string& where) {
  for (auto i = filters.size(); i-- > 0;) {
    if (i < 32 && (mask >> i & 1) != 0) continue;
    const auto& filter = filters[i];
    if (filter.number == 3) {
      shard::require(stored.size() >= 4, Code::BadFormat, [&] { return fmt::format("{}: a chunk is shorter than its checksum", where); });
      std::uint32_t told = 0;
      std::memcpy(&told, stored.data() + stored.size() - 4, 4);
      stored.resize(stored.size() - 4);
      const auto sum = fletcher32(stored);
      const auto swapped = (sum & 0x00ff00ff) << 8 | (sum >> 8 & 0x00ff00ff);  // as some old libraries wrote it
      shard::require(told == sum || told == swapped, Code::BadFormat, [&] { return fmt::format("{}: a chunk's Fletcher-32 is {:08x}; the file says {:08x}", where, sum, told); });
    } else if (filter.number == 2) {
      stored = unshuffle(stored, filter.item);
    } else if (filter.number == 1) {
      stored = inflate_all(stored, size, where);
    } else {
      Bytes out(size);
      const auto length = ZSTD_decompress(out.data(), out.size(), stored.data(), stored.size());
      shard::require(!ZSTD_isError(length) && length == size, Code::BadFormat, [&] { return fmt::format("{}: a zstd chunk cannot be read", where); });
      stored = std::move(out);
    }
  }
  shard::require(stored.size() == size, Code::BadFormat, [&] { return fmt::format("{}: a chunk holds {} bytes; should be {}", where, stored.size(), size); });
  return stored;
}

Bytes pack(std::span<const std::byte> chunk, int level) {
  thread_local const std::unique_ptr<ZSTD_CCtx, std::size_t (*)(ZSTD_CCtx*)> context(ZSTD_createCCtx(), ZSTD_freeCCtx);
  Bytes out(ZSTD_compressBound(chunk.size()) + 4);
  const auto length = ZSTD_compressCCtx(context.get(), out.data(), out.size(), chunk.data(), chunk.size(), level);
  shard::require(!ZSTD_isError(length), Code::Io, [&] { return fmt::format("zstd: {}", ZSTD_getErrorName(length)); });
  const auto sum = fletcher32(std::span(out).first(length));
  std::memcpy(out.data() + length, &sum, 4);
  out.resize(length + 4);
  return out;
}

}  // namespace formats::hdf5
