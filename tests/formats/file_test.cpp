#include "formats/file.h"

#include <doctest/doctest.h>
#include <sys/stat.h>

#include <array>
#include <optional>

#include "formats/local.h"
#include "libshard/error.h"
#include "tests/formats/temporary_folder.h"

using namespace formats;
using shard::Code;
namespace fs = std::filesystem;

namespace {

template <typename Call>
std::optional<Code> code_of(Call&& call) {
  try {
    call();
  } catch (const shard::Error& error) {
    return error.code;
  }
  return std::nullopt;
}

void write(const fs::path& path, std::string_view text) {
  OutFile(path).write(0, std::as_bytes(std::span(text.data(), text.size())));
}

}  // namespace

TEST_CASE("ranges are read, and a file that is too short says so") {
  const TemporaryFolder folder;
  write(folder.path() / "a", "0123456789");
  const File file(folder.path() / "a");
  CHECK(file.size() == 10);
  CHECK(file.text(3, 4) == "3456");
  CHECK(code_of([&] { file.text(8, 3); }) == Code::BadFormat);
  CHECK(code_of([&] { file.text(UINT64_MAX, 2); }) == Code::BadFormat);
  std::array<std::byte, 4> room;
  CHECK(code_of([&] { file.read(8, room); }) == Code::BadFormat);
  CHECK(code_of([&] { read_text(folder.path() / "a", 9); }) == Code::BadFormat);
}

TEST_CASE("only regular files open; a FIFO does not block") {
  const TemporaryFolder folder;
  REQUIRE(mkfifo((folder.path() / "fifo").c_str(), 0600) == 0);
  fs::create_symlink("loop", folder.path() / "loop");
  CHECK(code_of([&] { File(folder.path() / "fifo"); }) == Code::BadFormat);
  CHECK(code_of([&] { File(folder.path() / "loop"); }) == Code::BadFormat);
  CHECK(code_of([&] { File{folder.path()}; }) == Code::BadFormat);
  CHECK(code_of([&] { File(folder.path() / "none"); }) == Code::NotFound);
}

TEST_CASE("names from strangers stay inside the folder") {
  using namespace std::string_view_literals;
  const TemporaryFolder folder;
  const auto home = folder.path() / "home";
  fs::create_directories(home / "sub");
  write(folder.path() / "outside", "x");
  fs::create_symlink("../outside", home / "out");
  fs::create_symlink("b", home / "a");
  fs::create_symlink("a", home / "b");
  fs::create_symlink("sub", home / "in");
  for (const auto name : {""sv, "/etc/passwd"sv, "../outside"sv, "sub/../../outside"sv, "./x"sv, "sub/."sv,
                          ".."sv, "a\\b"sv, "x\0y"sv, "out"sv, "a"sv}) {
    CAPTURE(std::string(name));
    CHECK(code_of([&] { inside(home, name); }) == Code::BadFormat);
  }
  for (const auto name : {"x"sv, "sub/x"sv, "in/x"sv, "..x"sv, "x..y"sv})
    CHECK(inside(home, name) == home / name);
  // A folder that is reached through a link is as good as any other.
  fs::create_symlink("home", folder.path() / "link");
  CHECK_NOTHROW(inside(folder.path() / "link", "sub/x"));
}

TEST_CASE("what lies in a folder, there or not") {
  const TemporaryFolder folder;
  const auto home = folder.path() / "home";
  fs::create_directories(home / "sub");
  fs::create_symlink("home/sub", folder.path() / "in");
  fs::create_symlink("..", home / "out");
  for (const auto& path : {home, home / "x", home / "x/y", home / "sub/..", home / "none/../x", folder.path() / "in/x", home / "out/home"}) CHECK(lies_in(path, home));
  for (const auto& path : {folder.path(), folder.path() / "homes", home / "..", home / "out", home / "out/x", home / "none/../../x"}) CHECK(!lies_in(path, home));
  CHECK(lies_in(folder.path() / "new/x", folder.path() / "new/"));
  CHECK(lies_in("x", ""));
  CHECK(lies_in("/x", "/"));
  CHECK(!lies_in("/", "x"));
}

TEST_CASE("a snapshot of a Hugging Face cache has its files among the blobs") {
  const TemporaryFolder folder;
  const auto model = folder.path() / "models--o--m", snapshot = model / "snapshots" / "1";
  fs::create_directories(snapshot / "sub");
  fs::create_directories(model / "blobs" / "below");
  write(model / "blobs" / "h", "x");
  write(model / "blobs" / "below" / "h", "x");
  write(model / "h", "x");
  fs::create_symlink("../../blobs/h", snapshot / "in");
  fs::create_symlink("../../../blobs/h", snapshot / "sub" / "in");
  fs::create_symlink("../../blobs/below/h", snapshot / "below");
  fs::create_symlink("../../h", snapshot / "beside");
  fs::create_symlink("../../blobs", snapshot / "all");
  CHECK_NOTHROW(inside(snapshot, "in"));
  CHECK_NOTHROW(inside(snapshot, "sub/in"));
  CHECK_NOTHROW(inside(snapshot / "sub", "in"));
  for (const auto name : {"below", "beside", "all"}) CHECK(code_of([&] { inside(snapshot, name); }) == Code::BadFormat);
  CHECK(cache_blobs(snapshot / "sub") == fs::canonical(model / "blobs"));
  CHECK(!cache_blobs(model));
  CHECK(!cache_blobs("/"));
}

TEST_CASE("writing by range; what cannot be written is an Io error that names the file") {
  const TemporaryFolder folder;
  {
    OutFile out(folder.path() / "a");
    out.resize(8);
    const std::string_view text = "xy";
    out.write(3, std::as_bytes(std::span(text.data(), text.size())));
  }
  CHECK(read_text(folder.path() / "a") == std::string("\0\0\0xy\0\0\0", 8));
  CHECK(code_of([&] { OutFile(folder.path() / "none" / "a"); }) == Code::Io);
  if (fs::exists("/dev/full"))
    CHECK_THROWS_WITH_AS(write("/dev/full", "x"), doctest::Contains("/dev/full: cannot write: No space"),
                         shard::Error);
}

TEST_CASE("a file of a pool that was written to is refused, and the pool goes on") {
  const TemporaryFolder folder;
  std::vector<fs::path> paths;
  for (int i = 0; i < 600; ++i) {
    paths.push_back(folder.path() / std::to_string(i));
    write(paths.back(), "bytes");
  }
  const FilePool pool(paths);
  for (std::uint32_t i = 0; i < 512; ++i) pool.get(i);  // all that it keeps open
  fs::resize_file(paths[100], 2);
  for (int times = 0; times < 2; ++times) CHECK(code_of([&] { pool.get(599); }) == Code::Io);
  for (const std::uint32_t i : {0u, 99u, 511u}) CHECK(pool.get(i) != nullptr);
}
