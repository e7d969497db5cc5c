// copy_file_range, with every refusal that only means "not here" taken as an invitation to copy by hand.
#include "libshard/kernel_copy.h"

#include "libshard/error.h"

#include <cerrno>
#include <cstring>

#include <unistd.h>

namespace shard {

std::uint64_t kernel_copy(FileRange from, FileRange to, std::uint64_t bytes) {
  std::uint64_t moved = 0;
  while (moved < bytes) {
    auto in = static_cast<off_t>(from.offset + moved), out = static_cast<off_t>(to.offset + moved);
    const auto n = copy_file_range(from.descriptor, &in, to.descriptor, &out, bytes - moved, 0);
    if (n > 0) {
      moved += static_cast<std::uint64_t>(n);
    } else if (n == 0) {
      return moved;  // the source ends early: reading by hand says where
    } else if (errno == EINVAL || errno == EXDEV || errno == ENOSYS || errno == EOPNOTSUPP || errno == EBADF) {
      return moved;
    } else if (errno != EINTR) {
      fail(Code::Io, "copying in the kernel: {}", std::strerror(errno));
    }
  }
  return moved;
}

std::uint64_t kernel_copy(const Reader& reader, Writer& writer, const Copy& copy, std::uint64_t begin, std::uint64_t end) {
  auto from = reader.file_range(copy.from_stream), to = writer.file_range(copy.to_stream);
  if (!from || !to) return 0;
  from->offset += copy.from + begin;
  to->offset += copy.to + begin;
  return kernel_copy(*from, *to, end - begin);
}

}  // namespace shard
