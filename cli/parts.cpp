// Parts find each other by the name of a folder and know each other by a file in it: sums are files, and whoever renames their folder
// publishes.
#include "cli/parts.h"

#include "formats/file.h"
#include "formats/json.h"
#include "formats/kernels.h"
#include "libshard/error.h"

#include <cerrno>
#include <charconv>
#include <cstring>
#include <random>

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

namespace cli {
namespace {

namespace fs = std::filesystem;
using shard::Code;

constexpr std::size_t kMostParts = 65'536;

constexpr const char* kFiles = "files";
constexpr const char* kJoined = "joined";    // an entry for each part that writes or may yet; whoever can remove it is the last
constexpr const char* kConversion = "conversion.json";
constexpr const char* kMark = "shardkit conversion in parts";  // the key that makes a folder ours

fs::path beside(const fs::path& target) {
  const auto path = formats::as_written(target);
  return path.parent_path() / (formats::sibling_stem(path) + ".parts");
}

void make_folder(const fs::path& path) {
  std::error_code error;
  fs::create_directory(path, error);
  shard::require(!error, Code::Io, [&] { return fmt::format("{}: cannot create: {}", path.string(), error.message()); });
}

/// Written under another name first: a reader sees all of it or none.
void write_whole(const fs::path& path, std::string_view text) {
  const auto draft = path.string() + ".draft";
  std::error_code error;
  fs::remove(draft, error);
  formats::OutFile(draft).write(0, std::as_bytes(std::span(text)));
  fs::rename(draft, path, error);
  shard::require(!error, Code::Io, [&] { return fmt::format("{}: {}", path.string(), error.message()); });
}

std::string any_number() {
  std::random_device chance;
  return fmt::format("{:08x}{:08x}{:08x}{:08x}", chance(), chance(), chance(), chance());
}

/// What a folder's conversion.json says; nothing where the folder is none of ours.
std::optional<Json> conversion_in(const fs::path& folder) {
  if (!fs::is_regular_file(fs::symlink_status(folder / kConversion))) return std::nullopt;
  const auto text = formats::read_text(folder / kConversion, 16 << 20);
  auto out = Json::parse(text, nullptr, false);
  if (!out.is_object() || !out.contains(kMark) || !out[kMark].is_object()) return std::nullopt;
  return out[kMark];
}

/// False where the folder is being removed, or is of an earlier version.
bool join(const fs::path& folder, const std::string& part) {
  const int fd = ::open((folder / kJoined / part).c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  if (fd >= 0) ::close(fd);
  else if (errno != ENOENT) shard::fail(Code::Io, "{}: cannot create: {}", (folder / kJoined / part).string(), std::strerror(errno));
  return fd >= 0;
}

/// mkdtemp's folder is its user's only; ours is what mkdir would make, since parts may run under several users.
void widen(const fs::path& folder) {
  const auto probe = folder / "probe";
  struct stat info {};
  if (::mkdir(probe.c_str(), 0777) == 0 && ::stat(probe.c_str(), &info) == 0) ::chmod(folder.c_str(), info.st_mode & 07777);
  ::rmdir(probe.c_str());
}

/// Makes the folder in one step, with its conversion.json and its first part; false where there is one already.
bool make_joint(const fs::path& folder, const Json& conversion, const std::string& part) {
  auto draft = folder.string() + "-XXXXXX";
  if (!::mkdtemp(draft.data())) shard::fail(Code::Io, "{}: cannot create: {}", draft, std::strerror(errno));
  std::error_code ignored;
  try {
    widen(draft);
    make_folder(fs::path(draft) / kFiles);
    make_folder(fs::path(draft) / kJoined);
    join(draft, part);
    write_whole(fs::path(draft) / kConversion, Json{{kMark, conversion}}.dump(2));
    if (::rename(draft.c_str(), folder.c_str()) == 0) return true;
  } catch (...) {
    fs::remove_all(draft, ignored);
    throw;
  }
  const int why = errno;
  fs::remove_all(draft, ignored);
  shard::require(why == EEXIST || why == ENOTEMPTY || why == ENOTDIR, Code::Io, [&] { return fmt::format("{}: cannot create: {}", folder.string(), std::strerror(why)); });
  return false;
}

std::string value_of(const Json& options, const std::string& flag) {
  return options.contains(flag) ? options[flag].is_string() ? options[flag].get<std::string>() : options[flag].dump() : "nothing";
}

/// How the conversion that is under way differs from ours; "" where it does not.
std::string difference(const Json& theirs, const Json& mine) {
  for (const char* what : {"version", "parts"})
    if (theirs.value(what, Json()) != mine[what]) return fmt::format("{} {}, here {}", what, value_of(theirs, what), value_of(mine, what));
  const auto options = theirs.value("options", Json::object()), source = theirs.value("source", Json::object());
  for (const auto* side : {&mine["options"], &options})
    for (const auto& entry : side->items())
      if (const auto there = value_of(options, entry.key()), here = value_of(mine["options"], entry.key()); there != here) return fmt::format("{} {}, here {}", entry.key(), there, here);
  if (value_of(source, "iteration") != value_of(mine["source"], "iteration"))
    return fmt::format("a source of iteration {}, here {}", value_of(source, "iteration"), value_of(mine["source"], "iteration"));
  if (value_of(source, "files") != value_of(mine["source"], "files")) return "a source with files of other names or sizes";
  if (value_of(source, "times") != value_of(mine["source"], "times")) return "a source whose files were written at other times";
  return "";
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

JointFolder::JointFolder(const fs::path& target, const Part& part, Fingerprint mine, bool force) : target_(target), folder_(beside(target)), part_(part), force_(force) {
  formats::Publication::restore(target);
  shard::require(force || !fs::exists(fs::symlink_status(target)), Code::Usage, [&] { return fmt::format("{}: exists; --force replaces it", target.string()); });
  std::error_code error;
  fs::create_directories(folder_.parent_path(), error);
  shard::require(!error, Code::Io, [&] { return fmt::format("{}: cannot create: {}", folder_.parent_path().string(), error.message()); });
  const Json told{{"version", SHARDKIT_VERSION}, {"parts", part.count}, {"number", any_number()}, {"options", std::move(mine.options)}, {"source", std::move(mine.source)}};
  const auto conversion = Json::parse(plain_text(told));  // as the others will read it
  entry_ = fmt::format("{}-{}", part.index, any_number());
  if (!make_joint(folder_, conversion, entry_)) {
    const auto theirs = conversion_in(folder_);
    shard::require(theirs.has_value(), Code::Mismatch, [&] { return fmt::format("{}: holds no {} of shardkit's; should be what parts of {} share, or not be there", folder_.string(), kConversion, target.string()); });
    const auto differs = difference(*theirs, conversion);
    shard::require(differs.empty(), Code::Mismatch,
                   [&] { return fmt::format("{}: holds parts of another conversion ({}); give every part the same, or remove this folder to start afresh", folder_.string(), differs); });
    shard::require(!fs::exists(folder_ / "done"), Code::Mismatch,
                   [&] { return fmt::format("{}: all parts are done, and one is publishing them or died while it did; where none runs any more, remove this folder to start afresh", folder_.string()); });
    number_ = value_of(*theirs, "number");
    shard::require(join(folder_, entry_), Code::Mismatch, [&] { return fmt::format("{}: is being removed by a part that could not begin; where it stays, remove it, then start this part again", folder_.string()); });
  } else {
    number_ = value_of(conversion, "number");
  }
}

JointFolder::~JointFolder() {
  std::error_code error;
  const auto joined = folder_ / kJoined;
  if (!begun_ && ::unlink((joined / entry_).c_str()) == 0 && ::rmdir(joined.c_str()) == 0) fs::remove_all(folder_, error);
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

bool JointFolder::finish(const shard::Plan& whole, const shard::Report& report, formats::LocalWriter& writer, bool sync) {
  writer.folder().flush(sync);  // before another host may publish it
  const auto found = conversion_in(folder_);
  shard::require(found && value_of(*found, "number") == number_, Code::Mismatch,
                 [&] { return fmt::format("{}: was removed or begun anew while this part was written; start all parts again", folder_.string()); });
  const auto plan = fingerprint(whole, writer.describe(), writer.folder().names());
  const auto sums = folder_ / "sums", mine = folder_ / "done";
  make_folder(sums);
  write_whole(sums / std::to_string(part_.index), nlohmann::json{{"number", number_}, {"plan", plan}, {"sums", sums_of(report)}}.dump());
  for (std::size_t i = 0; i < part_.count; ++i)
    if (!fs::exists(sums / std::to_string(i))) return false;
  if (::rename(sums.c_str(), mine.c_str()) != 0) {
    if (errno == ENOENT || errno == EEXIST || errno == ENOTEMPTY) return false;  // another part was faster
    shard::fail(Code::Io, "{}: every part is done, and this one cannot publish: {}; start it again", sums.string(), std::strerror(errno));
  }
  std::error_code error;
  try {
    publish(mine, plan, report, writer, sync);
  } catch (...) {
    // Each part may try again while the files are there. Once they have their final name, sums speak of nothing.
    if (fs::exists(files(), error)) ::rename(mine.c_str(), sums.c_str());
    else fs::remove_all(folder_, error);
    throw;
  }
  fs::remove_all(folder_, error);
  return true;
}

void JointFolder::publish(const fs::path& sums, const std::string& plan, const shard::Report& report, formats::LocalWriter& writer, bool sync) {
  std::vector<nlohmann::json> parts;
  for (std::size_t i = 0; i < part_.count; ++i) {
    const auto path = sums / std::to_string(i);
    auto one = formats::parse_json(formats::read_text(path), path.string());
    shard::require(one.value("number", "") == number_ && one.value("plan", "") == plan && one.contains("sums"), Code::Mismatch,
                   [&] { return fmt::format("{}: part {} did something else than part {}; remove this folder to start afresh", folder_.string(), i + 1, part_.index + 1); });
    parts.push_back(std::move(one["sums"]));
  }
  writer.commit(join_sums(parts, report, writer), false);
  formats::Publication publication({files()}, target_, force_);
  publication.commit(sync);
  left_over_ = publication.left_over();
}

void remove_abandoned_parts(const fs::path& target) {
  const auto folder = beside(target);
  const auto draft = folder.filename().string() + "-";
  std::vector<fs::path> found;
  std::error_code error;
  for (fs::directory_iterator at(folder.parent_path(), error), end; !error && at != end; at.increment(error))
    if (const auto name = at->path().filename().string(); at->path().filename() == folder.filename() || (name.starts_with(draft) && name.size() == draft.size() + 6)) found.push_back(at->path());
  for (const auto& path : found) try {
      if (conversion_in(path)) fs::remove_all(path, error);
    } catch (const shard::Error&) {  // what cannot be read is not known to be ours
    }
}

}  // namespace cli
