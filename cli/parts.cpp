// Parts find each other by names alone: sums are files, and whoever renames their folder publishes.
#include "cli/parts.h"

#include "formats/file.h"
#include "formats/json.h"
#include "formats/kernels.h"
#include "libshard/error.h"

#include <charconv>
#include <cstring>

#include <stdio.h>

namespace cli {
namespace {

namespace fs = std::filesystem;
using shard::Code;

constexpr std::size_t kMostParts = 65'536;

fs::path beside(const fs::path& target, const Part& part, const char* what) {
  auto final_path = fs::absolute(target).lexically_normal();
  if (final_path.filename().empty()) final_path = final_path.parent_path();
  return final_path.parent_path() / fmt::format(".{}.{}-of-{}-parts", final_path.filename().string(), what, part.count);
}

void make_folder(const fs::path& path) {
  std::error_code error;
  fs::create_directories(path, error);
  shard::require(!error, Code::Io, [&] { return fmt::format("{}: {}", path.string(), error.message()); });
}

/// Written under another name first: a reader sees all of it or none.
void write_sums(const fs::path& path, const shard::Report& report) {
  const auto text = sums_of(report).dump(), draft = path.string() + ".draft";
  std::error_code error;
  fs::remove(draft, error);
  formats::OutFile(draft).write(0, std::as_bytes(std::span(text.data(), text.size())));
  fs::rename(draft, path, error);
  shard::require(!error, Code::Io, [&] { return fmt::format("{}: {}", path.string(), error.message()); });
}

/// Streams that no plan writes, such as an extra state's bytes.
std::uint32_t sum_of(const formats::LocalWriter& writer, std::uint32_t stream, std::uint64_t size) {
  std::vector<std::byte> bytes(size);
  writer.read(stream, 0, bytes);
  return formats::kernels().crc32(bytes);
}

}  // namespace

Part parse_part(const std::string& text) {
  Part out{0, 0};
  const auto slash = text.find('/');
  const auto number = [](std::string_view digits, std::size_t& value) {
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
    return error == std::errc() && end == digits.data() + digits.size();
  };
  const bool good = slash != text.npos && number(std::string_view(text).substr(0, slash), out.index) && number(std::string_view(text).substr(slash + 1), out.count);
  shard::require(good && out.index >= 1 && out.index <= out.count && out.count <= kMostParts, Code::Usage,
                 [&] { return fmt::format("--part {}: should be I/N with I from 1 to N", text); });
  --out.index;
  return out;
}

fs::path joint_folder(const fs::path& target, const Part& part, bool force) {
  shard::require(force || !fs::exists(fs::symlink_status(target)), Code::Usage, [&] { return fmt::format("{}: exists; --force replaces it", target.string()); });
  const auto folder = beside(target, part, "files");
  make_folder(folder);
  return folder;
}

nlohmann::json sums_of(const shard::Report& report) {
  auto out = nlohmann::json::array();
  for (std::size_t s = 0; s < report.crc32.size(); ++s)
    if (report.crc32[s]) out.push_back({s, *report.crc32[s]});
  return out;
}

std::vector<std::optional<std::uint32_t>> join_sums(std::span<const nlohmann::json> parts, const shard::Report& report, const formats::LocalWriter& writer) {
  auto sums = report.crc32;
  for (std::size_t part = 0; part < parts.size(); ++part)
    for (const auto& pair : parts[part]) {
      const auto stream = pair.at(0).get<std::size_t>();
      shard::require(stream < sums.size(), Code::BadFormat, [&] { return fmt::format("part {}: has a sum of stream {}; another conversion's?", part + 1, stream); });
      sums[stream] = pair.at(1).get<std::uint32_t>();
    }
  const auto& streams = writer.describe().streams;
  for (std::uint32_t s = 0; s < sums.size(); ++s)
    if (streams[s].summed && !sums[s]) sums[s] = sum_of(writer, s, streams[s].size);
  return sums;
}

bool finish_part(const fs::path& target, const Part& part, const shard::Report& report, formats::LocalWriter& writer, bool force, bool sync) {
  const auto sums_folder = beside(target, part, "sums");
  make_folder(sums_folder);
  write_sums(sums_folder / std::to_string(part.index), report);
  for (std::size_t i = 0; i < part.count; ++i)
    if (!fs::exists(sums_folder / std::to_string(i))) return false;
  const auto mine = beside(target, part, "done");
  if (::rename(sums_folder.c_str(), mine.c_str()) != 0) return false;  // another part was faster
  std::vector<nlohmann::json> parts;
  for (std::size_t i = 0; i < part.count; ++i) {
    const auto path = mine / std::to_string(i);
    parts.push_back(formats::parse_json(formats::read_text(path), path.string()));
  }
  writer.commit(join_sums(parts, report, writer), false);
  formats::Publication({beside(target, part, "files")}, target, force).commit(sync);
  std::error_code error;
  fs::remove_all(mine, error);
  return true;
}

}  // namespace cli
