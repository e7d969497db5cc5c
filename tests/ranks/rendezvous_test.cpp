// Ranks as threads, each with its own connections; strangers at the door; ranks that fail, leave or never come.
#include "ranks/rendezvous.h"
#include "ranks/socket.h"

#include <doctest/doctest.h>
#include <sys/socket.h>
#include <unistd.h>

#include <fstream>
#include <mutex>
#include <thread>

using namespace std::chrono_literals;

namespace {

ranks::Launch rank_of(int rank, int size) { return {rank, size, rank, size, "", "WORLD_SIZE"}; }

ranks::Place by_file() {
  static int number = 0;
  return {"", "", "", std::filesystem::temp_directory_path() / fmt::format("shardkit-ranks-{}-{}", ::getpid(), number++)};
}

ranks::Place by_address() {
  const auto free = ranks::listen_on("127.0.0.1", "0");
  return {"127.0.0.1", ranks::port_of(free), "the word", {}};
}

using Body = std::function<void(ranks::Rendezvous&)>;

/// What each rank threw; "" where nothing.
std::vector<std::string> run(int size, const ranks::Place& place, const Body& body, std::chrono::milliseconds patience = 10s) {
  std::vector<std::string> out(static_cast<std::size_t>(size));
  std::vector<std::thread> threads;
  for (int r = 0; r < size; ++r)
    threads.emplace_back([&, r] {
      try {
        ranks::Rendezvous all(rank_of(r, size), place, patience);
        body(all);
      } catch (const shard::Error& error) {
        out[static_cast<std::size_t>(r)] = fmt::format("{} {}", static_cast<int>(error.code), error.what());
      }
    });
  for (auto& thread : threads) thread.join();
  return out;
}

std::string long_text(int rank) { return std::string(300'000, static_cast<char>('a' + rank)); }

}  // namespace

TEST_CASE("all ranks see all texts, by a file and by an address") {
  for (const auto& place : {by_file(), by_address()}) {
    std::mutex mutex;
    std::vector<std::vector<std::string>> seen;
    const auto threw = run(4, place, [&](ranks::Rendezvous& all) {
      for (int turn = 0; turn < 3; ++turn) {
        auto texts = all.all_gather(long_text(all.rank()));
        const auto word = all.broadcast(all.rank() == 2 ? "from two" : "ignored", 2);
        const std::lock_guard lock(mutex);
        seen.push_back(std::move(texts));
        seen.back().push_back(word);
      }
      all.finish();
    });
    CHECK(threw == std::vector<std::string>(4));
    REQUIRE(seen.size() == 12);
    for (const auto& texts : seen) CHECK(texts == std::vector<std::string>{long_text(0), long_text(1), long_text(2), long_text(3), "from two"});
    CHECK(!std::filesystem::exists(place.file));
  }
}

TEST_CASE("a failure reaches every rank with its text and status, also those that are busy") {
  const auto threw = run(3, by_file(), [&](ranks::Rendezvous& all) {
    all.barrier();
    if (all.rank() == 1) {
      const shard::Error why(shard::Code::BadLayout, "x.pt: cannot be cut");
      all.fail(why);
      throw why;
    }
    std::atomic<bool> called = false;
    all.on_failure([&] { called = true; });
    if (all.rank() == 2)
      while (!all.failed()) std::this_thread::sleep_for(1ms);
    try {
      all.barrier();
    } catch (const shard::Error&) {
      for (int i = 0; i < 5000 && !called; ++i) std::this_thread::sleep_for(1ms);
      CHECK(called);
      throw;
    }
  });
  CHECK(threw == std::vector<std::string>{"5 rank 1: x.pt: cannot be cut", "5 x.pt: cannot be cut", "5 rank 1: x.pt: cannot be cut"});
}

TEST_CASE("what a rank says before it ends at once is heard") {
  for (int turn = 0; turn < 30; ++turn)
    for (const int bad : {0, 1}) {
      const auto threw = run(3, by_file(), [&](ranks::Rendezvous& all) {
        if (all.rank() != bad) {
          all.all_gather(long_text(all.rank()));
          return;
        }
        const shard::Error why(shard::Code::Usage, "x: exists");
        all.fail(why);  // behind its welcome, and with the others' texts unread
        throw why;
      });
      for (int r = 0; r < 3; ++r) CHECK(threw[static_cast<std::size_t>(r)] == (r == bad ? std::string("2 x: exists") : fmt::format("2 rank {}: x: exists", bad)));
    }
}

TEST_CASE("a rank that leaves early fails the others") {
  const auto threw = run(3, by_file(), [](ranks::Rendezvous& all) {
    all.barrier();
    if (all.rank() != 2) all.barrier();
  });
  CHECK(threw == std::vector<std::string>{"7 rank 2: left early", "7 rank 2: left early", ""});
  const auto without_0 = run(3, by_file(), [](ranks::Rendezvous& all) {
    all.barrier();
    if (all.rank() != 0) all.barrier();
  });
  CHECK(without_0 == std::vector<std::string>{"", "7 rank 0: left early", "7 rank 0: left early"});
}

TEST_CASE("a rank that never comes is named, and nobody waits for ever") {
  const auto place = by_file();
  std::vector<std::string> said;
  std::thread other([&] {
    try {
      ranks::Rendezvous all(rank_of(1, 3), place, 10s);
    } catch (const shard::Error& error) {
      said.push_back(error.what());
    }
  });
  CHECK_THROWS_WITH(ranks::Rendezvous(rank_of(0, 3), place, 300ms), "rank 2 did not come within 0.3 s; WORLD_SIZE=3 says how many there are (without it one process works alone)");
  other.join();
  CHECK(said == std::vector<std::string>{"rank 2 did not come within 0.3 s; WORLD_SIZE=3 says how many there are (without it one process works alone)"});
  CHECK_THROWS_WITH(ranks::Rendezvous(rank_of(1, 3), place, 100ms), fmt::format("{}: rank 1 did not find rank 0 there within 0.1 s: there is no such file yet", place.file.string()).c_str());
  const std::atomic<bool> stop = true;
  CHECK_THROWS_WITH(ranks::Rendezvous(rank_of(0, 2), by_file(), 10s, &stop), "stopped by a signal");
  CHECK_THROWS_WITH(ranks::Rendezvous(rank_of(1, 2), by_file(), 10s, &stop), "stopped by a signal");
}

TEST_CASE("strangers, wrong secrets, wrong numbers") {
  const auto place = by_address();
  std::string why, wrong_word, other_size;
  std::thread door([&] {
    const auto threw = run(1, place, [](ranks::Rendezvous&) {}, 1ms);  // a first rank 0 that gives up frees the port
    try {
      ranks::Rendezvous all(rank_of(0, 3), place, 10s);
      why = fmt::format("{}", all.all_gather("0").size());
      all.finish();
    } catch (const shard::Error& error) {
      why = error.what();
    }
  });
  const auto raw = [&] {
    std::string ignored;
    ranks::Socket out;
    while (!(out = ranks::connect_to(place.host, place.port, 1s, ignored))) std::this_thread::sleep_for(5ms);
    return out;
  };
  const auto silent = raw();  // says nothing and stays
  const auto web = raw();
  CHECK(::send(web.fd(), "GET / HTTP/1.1\r\n\r\n", 18, MSG_NOSIGNAL) == 18);
  const auto huge = raw();
  const std::uint32_t head[2] = {1, 0xffffffff};
  CHECK(::send(huge.fd(), head, sizeof head, MSG_NOSIGNAL) == sizeof head);
  const auto closed_now = [](const ranks::Socket& one) {
    char byte;
    return ::recv(one.fd(), &byte, 1, 0) <= 0;  // blocks until the door closes it
  };
  CHECK(closed_now(web));
  CHECK(closed_now(huge));
  const auto join = [&](int rank, int size, const std::string& secret, std::string& said) {
    try {
      auto mine = place;
      mine.secret = secret;
      ranks::Rendezvous all(rank_of(rank, size), mine, 10s);
      all.all_gather("x");
      all.finish();
    } catch (const shard::Error& error) {
      said = error.what();
    }
  };
  join(1, 3, "another word", wrong_word);
  CHECK(wrong_word == fmt::format("127.0.0.1:{}: refused rank 1: is SHARDKIT_SECRET the same in every rank?", place.port));
  join(1, 4, "the word", other_size);
  CHECK(other_size == "rank 1 says there are 4 ranks; rank 0 says 3");
  std::string one, same, two;
  std::atomic<int> settled = 0;
  std::thread first([&] { join(1, 3, "the word", one), ++settled; }), again([&] { join(1, 3, "the word", same), ++settled; });
  while (settled == 0) std::this_thread::sleep_for(1ms);  // one of the two is refused at once
  join(2, 3, "the word", two);
  first.join();
  again.join();
  door.join();
  CHECK(one + same == "a rank 1 is here already");
  CHECK(two == "");
  CHECK(why == "3");
}

TEST_CASE("the file that an earlier start left behind misleads nobody") {
  const auto place = by_file();
  {
    std::ofstream(place.file) << "shardkit-ranks-1\n" << ranks::host_name() << "\n1\nold\n";
  }
  CHECK(run(2, place, [](ranks::Rendezvous& all) { all.finish(); }) == std::vector<std::string>(2));
}
