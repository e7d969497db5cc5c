// Streaming decompression into a temporary file that has no name.
#include "formats/zstd_item.h"

#include "libshard/error.h"

#include <algorithm>
#include <cstdio>
#include <vector>

#include <fcntl.h>
#include <unistd.h>
#include <zstd.h>

namespace formats {
namespace {

constexpr std::uint64_t kMostGrowth = 1000, kFreeGrowth = 1 << 20;

int nameless_file() {
  auto* file = std::tmpfile();
  shard::require(file != nullptr, shard::Code::Io, [] { return "cannot create a temporary file"; });
  const int fd = ::fcntl(::fileno(file), F_DUPFD_CLOEXEC, 0);
  std::fclose(file);
  return fd;
}

void append(int fd, std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const auto n = ::write(fd, bytes.data(), bytes.size());
    shard::require(n > 0, shard::Code::Io, [] { return "cannot write a temporary file"; });
    bytes = bytes.subspan(static_cast<std::size_t>(n));
  }
}

}  // namespace

std::shared_ptr<const File> inflate_item(const File& file, std::uint64_t offset, std::uint64_t length) {
  const std::unique_ptr<ZSTD_DStream, std::size_t (*)(ZSTD_DStream*)> stream(ZSTD_createDStream(), ZSTD_freeDStream);
  const int fd = nameless_file();
  auto out = std::make_shared<const File>(fd, file.name());
  std::vector<std::byte> in(128 << 10), plain(256 << 10);
  std::uint64_t written = 0, read = 0;
  std::size_t state = 1;
  while (read < length) {
    const auto part = std::span(in).first(std::min<std::uint64_t>(in.size(), length - read));
    file.read(offset + read, part);
    read += part.size();
    ZSTD_inBuffer source{part.data(), part.size(), 0};
    do {
      ZSTD_outBuffer target{plain.data(), plain.size(), 0};
      state = ZSTD_decompressStream(stream.get(), &target, &source);
      shard::require(!ZSTD_isError(state), shard::Code::BadFormat, [&] { return fmt::format("{}: zstd: {}", file.name(), ZSTD_getErrorName(state)); });
      append(fd, std::span(plain).first(target.pos));
      written += target.pos;
      shard::require(written <= kFreeGrowth + kMostGrowth * length, shard::Code::BadFormat, [&] { return fmt::format("{}: zstd item grows beyond reason", file.name()); });
      if (target.pos < target.size && source.pos == source.size) break;
    } while (true);
  }
  shard::require(state == 0, shard::Code::BadFormat, [&] { return fmt::format("{}: zstd item is cut short", file.name()); });
  return std::make_shared<const File>(::fcntl(fd, F_DUPFD_CLOEXEC, 0), file.name());
}

}  // namespace formats
