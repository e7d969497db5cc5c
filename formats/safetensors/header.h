// The header of a safetensors file, both ways: u64 length, JSON, then the bytes it describes without gap or
// overlap.
#pragma once

#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "formats/file.h"
#include "libshard/box.h"
#include "libshard/dtype.h"

namespace formats::safetensors {

constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;  // page, limits

struct Entry {
  std::string name;
  shard::DType dtype;
  shard::Shape shape;
  std::uint64_t begin, end;  ///< relative to the data
};

struct Header {
  std::vector<Entry> entries;  ///< by begin
  std::map<std::string, std::string> metadata;
  std::uint64_t data_offset = 0;  ///< in the file
};

/// Throws BadFormat with the file's name.
Header read_header(const File& file);
/// `data_bytes`: what lies behind the header.
Header parse_header(std::string_view json, std::uint64_t data_bytes, std::string_view where);
/// Length and JSON, padded with spaces to a multiple of eight.
std::string write_header(std::span<const Entry> entries, const std::map<std::string, std::string>& metadata);

}  // namespace formats::safetensors
