// What ranks tell each other comes back as it was, and is refused where it ends early.
#include "lm/message.h"

#include <doctest/doctest.h>

#include <cmath>

TEST_CASE("values come back in order") {
  lm::MessageWriter out;
  const std::map<std::string, std::vector<int>> lists{{"", {}}, {"b", {1, 2}}};
  out(7, std::string("word"), lists, -0.0f);
  int number = 0;
  std::string word;
  std::map<std::string, std::vector<int>> found;
  float zero = 1;
  lm::MessageReader in(out.text());
  in(number, word, found, zero);
  CHECK(number == 7);
  CHECK(word == "word");
  CHECK(found == lists);
  CHECK(std::signbit(zero));
}

TEST_CASE("a message that ends early, or names more than it holds, is refused") {
  lm::MessageWriter out;
  out(std::vector<std::string>{"one", "two"});
  for (std::size_t length = 0; length < out.text().size(); ++length) {
    std::vector<std::string> found;
    lm::MessageReader in(std::string_view(out.text()).substr(0, length));
    CHECK_THROWS_WITH_AS(in(found), "ranks: a message ends early; do all run the same program?", shard::Error);
  }
  lm::MessageWriter huge;
  huge(~std::size_t{0});
  std::vector<double> found;
  lm::MessageReader in(huge.text());
  CHECK_THROWS_AS(in(found), shard::Error);
}
