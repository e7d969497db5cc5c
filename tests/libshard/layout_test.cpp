#include "libshard/layout.h"

#include "libshard/error.h"

#include <doctest/doctest.h>

#include <cstdint>

using namespace shard;

namespace {

Parallel sizes(Index tp, Index pp, Index vpp = 1) {
  Parallel out;
  out.tp = out.etp = tp;
  out.pp = pp;
  out.vpp = vpp;
  return out;
}

}  // namespace

TEST_CASE("layers of a stage with virtual chunks interleave") {
  const auto p = place_layers(sizes(1, 2, 2), 8);
  CHECK(p.at({0, 0}) == std::vector<Index>{0, 1});
  CHECK(p.at({1, 0}) == std::vector<Index>{2, 3});
  CHECK(p.at({0, 1}) == std::vector<Index>{4, 5});
  CHECK(p.at({1, 1}) == std::vector<Index>{6, 7});
  CHECK(p.of_layer(5) == Chunk{0, 1});
  CHECK(p.output == Chunk{1, 1});
  const auto four = place_layers(sizes(1, 2, 4), 8);
  CHECK(four.at({0, 3}) == std::vector<Index>{6});
}

TEST_CASE("uneven ends and counted embedding or loss") {
  auto ends = sizes(1, 4);
  ends.first_stage_layers = 1;
  ends.last_stage_layers = 3;
  const auto p = place_layers(ends, 8);
  CHECK(p.at({0, 0}) == std::vector<Index>{0});
  CHECK(p.at({1, 0}) == std::vector<Index>{1, 2});
  CHECK(p.at({3, 0}) == std::vector<Index>{5, 6, 7});
  auto counted = sizes(1, 2, 2);
  counted.account_for_embedding = counted.account_for_loss = true;
  const auto q = place_layers(counted, 6);
  CHECK(q.at({0, 0}) == std::vector<Index>{0});
  CHECK(q.at({1, 0}) == std::vector<Index>{1, 2});
  CHECK(q.at({0, 1}) == std::vector<Index>{3, 4});
  CHECK(q.at({1, 1}) == std::vector<Index>{5});
}

TEST_CASE("layout texts expand as Megatron expands them") {
  auto text = sizes(1, 4);
  text.pp_layout = "Ettt|(tt|)*5,m|L";
  const auto p = place_layers(text, 13, 1);
  CHECK(p.chunks == 2);
  CHECK(p.at({0, 0}) == std::vector<Index>{0, 1, 2});
  CHECK(p.at({0, 1}) == std::vector<Index>{9, 10});
  CHECK(p.mtp == Chunk{2, 1});
  CHECK(p.output == Chunk{3, 1});
  CHECK(p.final_norm == Chunk{1, 1});
  text.pp_layout = "Et*3|t*2|tL";
  text.pp = 3;
  CHECK(place_layers(text, 6).at({1, 0}) == std::vector<Index>{3, 4});
}

TEST_CASE("impossible layouts are refused") {
  CHECK_THROWS_AS(place_layers(sizes(1, 3), 8), Error);
  CHECK_THROWS_AS(place_layers(sizes(1, 1, 2), 8), Error);
  CHECK_THROWS_AS(place_layers(sizes(1, 2, 3), 8), Error);
  auto ends = sizes(1, 2);
  ends.first_stage_layers = 5;
  ends.last_stage_layers = 5;
  CHECK_THROWS_AS(place_layers(ends, 8), Error);
  for (const char* bad : {"Et|t", "t|EL", "Et|tL|", "E((t)*2)*2|L", "Etx|L", "E*|L", "Et*99999999|L", "Emt|tL", "EtL|tt"}) {
    auto text = sizes(1, 2);
    text.pp_layout = bad;
    CAPTURE(bad);
    CHECK_THROWS_AS(place_layers(text, 2), Error);
  }
}

TEST_CASE("cells of a stage follow Megatron's rank order") {
  Parallel p = sizes(2, 1);
  p.ep = 4;
  p.etp = 1;
  std::vector<std::pair<Index, Index>> got;
  for (const auto& cell : cells(p)) got.emplace_back(cell.tensor, cell.expert);
  CHECK(got == std::vector<std::pair<Index, Index>>{{0, 0}, {1, 1}, {0, 2}, {1, 3}});
  p.ep = 2;
  p.etp = 2;
  CHECK(cells(p).size() == 4);
  p.etp = 4;
  CHECK_THROWS_AS(cells(p), Error);
}

TEST_CASE("vocabulary padding and cuts") {
  CHECK(padded_vocab(250, 8, 2) == 256);
  CHECK(padded_vocab(250, 128, 4) == 512);
  CHECK(padded_vocab(0, 128, 4) == 0);
  const auto gated = cut(16, 2, 4, 1);
  REQUIRE(gated.size() == 2);
  CHECK(gated[0].lo == 2);
  CHECK(gated[1].lo == 10);
  CHECK_THROWS_AS(cut(10, 2, 4, 0), Error);
}

TEST_CASE("sizes whose products wrap are no layout") {
  constexpr Index kHuge = INT64_MAX;
  const auto refused = [](Index tp, Index pp, Index vpp, Index ep, Index etp) {
    auto p = sizes(tp, pp, vpp);
    p.ep = ep, p.etp = etp;
    CHECK_THROWS_WITH(place_layers(p, 4), doctest::Contains("more ranks than any cluster has"));
  };
  refused(1, 1, 1, 1, kHuge);
  refused(1, 1, 1, 1, 1'000'000'000'000);
  refused(Index{1} << 32, 1, 1, Index{1} << 32, 1);
  refused(1, 2, kHuge, 1, 1);
  refused(1, Index{1} << 32, Index{1} << 32, 1, 1);
  refused(65'535, 1, 1, 1, 65'521);
}
