#include "formats/json.h"

#include <doctest/doctest.h>

#include "libshard/error.h"

using formats::parse_json;

TEST_CASE("one document, and nothing odd about it") {
  CHECK(parse_json(R"({"a":[1,2,{"b":null}],"c":"ü"})", "w")["a"][2]["b"].is_null());
  CHECK(parse_json(R"([{"a":1},{"a":2}])", "w").size() == 2);
  for (const std::string_view text :
       {"", "{", "{} {}", "{}x", "[1,]", "{'a':1}", "nul", "[\"\xff\"]", "[\"\xed\xa0\x80\"]",
        R"(["\ud800"])", "[1e999]", "// c\n1", R"({"a":1,"a":2})", R"({"a":1,"\u0061":2})",
        R"({"x":{"a":1,"b":2,"a":3}})"}) {
    CAPTURE(text);
    CHECK_THROWS_WITH_AS(parse_json(text, "where"), doctest::Contains("where: "), shard::Error);
  }
}

TEST_CASE("NUL does not end a document") {
  using namespace std::string_view_literals;
  CHECK_THROWS_AS(parse_json("{}\0trash"sv, "w"), shard::Error);
  CHECK_THROWS_AS(parse_json("{}\0"sv, "w"), shard::Error);
}

TEST_CASE("depth has a limit, however deep it goes") {
  const auto nested = [](std::size_t n) { return std::string(n, '[') + std::string(n, ']'); };
  CHECK_NOTHROW(parse_json(nested(256), "w"));
  for (const std::size_t n : {257, 100'000, 3'000'000})
    CHECK_THROWS_AS(parse_json(nested(n), "w"), shard::Error);
}

TEST_CASE("a complaint is in our words") {
  CHECK_THROWS_WITH_AS(parse_json(R"({"\ud800":1})", "w"), doctest::Contains("w: no JSON at line 1, column 9: object key: invalid string: surrogate U+D800"), shard::Error);
  CHECK_THROWS_WITH_AS(parse_json(R"({"a":1 x})", "w"), "w: no JSON at line 1, column 8: object: invalid literal; last read: '1 x'; expected '}'", shard::Error);
  CHECK_THROWS_WITH_AS(parse_json("[1e999]", "w"), "w: number overflow parsing '1e999'", shard::Error);
}

TEST_CASE("a complaint is one short printable line") {
  try {
    parse_json("[\"" + std::string(100'000, 'x') + "\n\xff", "w");
    FAIL("accepted");
  } catch (const shard::Error& error) {
    const std::string_view text = error.what();
    CHECK(text.size() < 400);
    CHECK(text.find('\n') == text.npos);
  }
}
