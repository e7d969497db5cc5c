// Items behind torch's "stream.zstd" transform: unpacked into a nameless file, so that they are read by range as others.
#pragma once

#include "formats/file.h"

#include <memory>

namespace formats {

/// The plain bytes of a zstd stream at [offset, offset + length) of a file. Throws BadFormat where it is damaged or
/// would grow more than a thousandfold.
std::shared_ptr<const File> inflate_item(const File& file, std::uint64_t offset, std::uint64_t length);

}  // namespace formats
