#include "formats/publication.h"

#include <doctest/doctest.h>
#include <signal.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <fcntl.h>

#include <cerrno>
#include <fstream>

#include "formats/file.h"
#include "libshard/error.h"
#include "tests/formats/temporary_folder.h"

using formats::Publication;
namespace fs = std::filesystem;

namespace {

/// What the file system of NFS, where parts may lie, does not have; and a process that is killed, or a rename that is refused, half-way.
bool no_flags = false;
std::string dies_before, refuses;

}  // namespace

extern "C" int renameat2(int from_folder, const char* from, int to_folder, const char* to, unsigned flags) noexcept {
  if (!no_flags) return static_cast<int>(syscall(SYS_renameat2, from_folder, from, to_folder, to, flags));
  errno = EINVAL;
  return -1;
}

extern "C" int rename(const char* from, const char* to) noexcept {
  if (!dies_before.empty() && dies_before == to) _exit(9);
  if (!refuses.empty() && std::string_view(from).ends_with(refuses)) {
    errno = EACCES;
    return -1;
  }
  return static_cast<int>(syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0u));
}

namespace {

std::size_t entries(const fs::path& folder) {
  return static_cast<std::size_t>(std::distance(fs::directory_iterator(folder), fs::directory_iterator()));
}

void publish(const fs::path& path, std::string_view text, bool force) {
  Publication publication(path, force);
  fs::create_directories(publication.staging() / "sub");
  std::ofstream(publication.staging() / "sub" / "x") << text;
  CHECK(publication.staging().parent_path() == path.parent_path());
  publication.commit(true);
}

}  // namespace

TEST_CASE("nothing shows before commit and nothing stays without it") {
  const TemporaryFolder folder;
  const auto path = folder.path() / "out";
  {
    Publication publication(path, false);
    std::ofstream(publication.staging() / "x") << "x";
    CHECK_FALSE(fs::exists(path));
  }
  CHECK(entries(folder.path()) == 0);
  publish(path, "new", false);
  CHECK(formats::read_text(path / "sub" / "x") == "new");
  CHECK(entries(folder.path()) == 1);
}

TEST_CASE("what exists is replaced only by force, in one step, whatever it is") {
  const TemporaryFolder folder;
  const auto path = folder.path() / "out";
  publish(path, "old", false);
  CHECK_THROWS_WITH_AS(Publication(path, false), doctest::Contains("exists; --force replaces it"),
                       shard::Error);
  publish(path, "new", true);
  CHECK(formats::read_text(path / "sub" / "x") == "new");
  fs::remove_all(path);
  std::ofstream(path) << "a file";
  publish(path, "newer", true);
  CHECK(formats::read_text(path / "sub" / "x") == "newer");
  CHECK(entries(folder.path()) == 1);
}

TEST_CASE("what appeared meanwhile is not replaced without force") {
  const TemporaryFolder folder;
  const auto path = folder.path() / "out";
  {
    Publication publication(path, false);
    fs::create_directory(path);
    CHECK_THROWS_AS(publication.commit(false), shard::Error);
  }
  CHECK(fs::is_empty(path));
  CHECK(entries(folder.path()) == 1);
}

TEST_CASE("a single file") {
  const TemporaryFolder folder;
  const auto path = folder.path() / "out.bin";
  Publication publication(path, false, Publication::Kind::File);
  std::ofstream(publication.staging()) << "bytes";
  publication.commit(true);
  CHECK(formats::read_text(path) == "bytes");
  CHECK(entries(folder.path()) == 1);
}

TEST_CASE("leavings of a killed process go, those of a living one stay") {
  const TemporaryFolder folder;
  const auto path = folder.path() / "out";
  int ready[2];
  REQUIRE(pipe(ready) == 0);
  const auto child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    const Publication publication(path, false);
    std::ofstream(publication.staging() / "x") << "x";
    if (write(ready[1], "r", 1) == 1) pause();
    _exit(0);
  }
  char byte;
  REQUIRE(read(ready[0], &byte, 1) == 1);
  { const Publication second(path, false); }
  CHECK(entries(folder.path()) == 1);
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  CHECK(entries(folder.path()) == 1);
  { const Publication third(path, false); }
  CHECK(entries(folder.path()) == 0);
  close(ready[0]);
  close(ready[1]);
}

TEST_CASE("only what a publication makes is taken for a leaving") {
  const TemporaryFolder folder;
  for (const auto* name : {".out.shardkit-notes.txt", ".out.shardkit-", ".out.shardkit-1", ".out.shardkit-1-", ".out.shardkit-1-2x", ".out.shardkit-1-2-3", "out.shardkit-1-2"})
    std::ofstream(folder.path() / name) << "mine";
  fs::create_directory(folder.path() / ".out.shardkit-1-2");
  { const Publication publication(folder.path() / "out", false); }
  CHECK(entries(folder.path()) == 7);
}

TEST_CASE("what was moved out of the way by a process that died is put back") {
  const TemporaryFolder folder;
  const auto path = folder.path() / "out", old = folder.path() / ".out.shardkit-1-2-old";
  const auto killed = [&] {
    fs::create_directory(old);
    std::ofstream(old / "x") << "old";
    fs::create_directory(folder.path() / ".out.shardkit-1-2");
  };
  killed();
  CHECK_THROWS_WITH_AS(Publication(path, false), doctest::Contains("exists; --force replaces it"), shard::Error);
  CHECK(formats::read_text(path / "x") == "old");
  fs::remove_all(path);
  killed();
  publish(path, "new", true);
  CHECK(formats::read_text(path / "sub" / "x") == "new");
  CHECK(entries(folder.path()) == 1);
  killed();
  publish(path, "newer", true);  // somebody made the target anew since: neither is ours to remove
  CHECK(formats::read_text(old / "x") == "old");
}

TEST_CASE("where nothing can be made the system's reason comes back") {
  const TemporaryFolder folder;
  std::ofstream(folder.path() / "file") << "x";
  try {
    Publication(folder.path() / "file" / "out", false);
    FAIL("accepted");
  } catch (const shard::Error& error) {
    CHECK(error.code == shard::Code::Io);
  }
}

TEST_CASE("where two names cannot be exchanged, an adopted folder replaces what was there all the same") {
  const TemporaryFolder folder;
  const auto path = folder.path() / "out", parts = folder.path() / ".out.parts";
  const auto replace = [&] {
    Publication publication({parts / "files"}, path, true);
    publication.commit(false);
    return publication.left_over();
  };
  const auto prepare = [&] {
    fs::remove_all(path);
    fs::create_directories(parts / "files");
    std::ofstream(parts / "files/x") << "new";
    fs::create_directory(path);
    std::ofstream(path / "x") << "old";
    no_flags = true;
  };
  prepare();
  CHECK(replace().empty());
  CHECK(formats::read_text(path / "x") == "new");
  CHECK(entries(folder.path()) == 2);

  prepare();  // killed when neither is there
  const auto child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    dies_before = path.string();
    replace();
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  CHECK(WEXITSTATUS(status) == 9);
  CHECK_FALSE(fs::exists(path));
  fs::remove_all(parts);  // as those who begin afresh are told
  Publication::restore(path);
  CHECK(formats::read_text(path / "x") == "old");

  prepare();  // published, and the old one cannot be removed
  refuses = "-old";
  const auto rest = replace();
  CHECK(formats::read_text(path / "x") == "new");
  CHECK(rest.empty());
  no_flags = false, refuses.clear();
}
