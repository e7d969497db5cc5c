#include <doctest/doctest.h>

#include <chrono>
#include <cstring>

#include "formats/safetensors/header.h"
#include "libshard/error.h"
#include "tests/formats/temporary_file.h"

using namespace formats::safetensors;
using shard::DType;

namespace {

/// A header of one F32 tensor of two elements with the record's text replaced.
Header parse_record(const std::string& record, std::uint64_t data_bytes = 8) {
  return parse_header(R"({"w":)" + record + "}", data_bytes, "f");
}

void refuses(const std::string& json, const char* why, std::uint64_t data_bytes = 8) {
  CAPTURE(json);
  CHECK_THROWS_WITH_AS(parse_header(json, data_bytes, "f"), doctest::Contains(why), shard::Error);
}

std::string file_of(const std::string& json, const std::string& data) {
  const std::uint64_t length = json.size();
  std::string out(8, '\0');
  std::memcpy(out.data(), &length, 8);
  return out + json + data;
}

const std::string kGood = R"({"dtype":"F32","shape":[2],"data_offsets":[0,8]})";

}  // namespace

TEST_CASE("what is written is read") {
  const std::vector<Entry> entries{{"a\"\\\n\x01 ü../..", DType::BF16, {2, 3}, 0, 12},
                                   {"scalar", DType::F64, {}, 12, 20},
                                   {"none", DType::I8, {0, 7}, 20, 20},
                                   {"packed", DType::F4E2M1x2, {3, 2}, 20, 26}};
  const auto text = write_header(entries, {{"format", "pt"}});
  CHECK(text.size() % 8 == 0);
  const TemporaryFile file(text + std::string(26, 'x'));
  const auto header = read_header(file.open());
  CHECK(header.data_offset == text.size());
  CHECK(header.metadata.at("format") == "pt");
  REQUIRE(header.entries.size() == 4);
  for (std::size_t i = 0; i < 4; ++i) {
    CHECK(header.entries[i].name == entries[i].name);
    CHECK(header.entries[i].dtype == entries[i].dtype);
    CHECK(header.entries[i].shape == entries[i].shape);
    CHECK(header.entries[i].begin == entries[i].begin);
  }
  CHECK(text.find(R"("packed":{"dtype":"F4","shape":[3,4])") != text.npos);
  CHECK(write_header({}, {}).substr(8) == "{}      ");
  const Entry odd[] = {{"\xff", DType::U8, {1}, 0, 1}}, complex[] = {{"c", DType::C128, {1}, 0, 16}};
  CHECK_THROWS_AS(write_header(odd, {}), shard::Error);
  CHECK_THROWS_AS(write_header(complex, {}), shard::Error);
}

TEST_CASE("each rule of a record refuses what breaks it") {
  CHECK(parse_record(kGood).entries.size() == 1);
  CHECK(parse_header("  {\"w\":" + kGood + "}  ", 8, "f").entries.size() == 1);
  CHECK(parse_record(R"({"dtype":"F32","shape":[2],"data_offsets":[0,8],"more":{"x":[1,null]},"y":-1.5})")
            .entries.size() == 1);
  const auto record = [](const char* dtype, const char* shape, const char* offsets) {
    return fmt::format(R"({{"w":{{"dtype":{},"shape":{},"data_offsets":{}}}}})", dtype, shape, offsets);
  };
  refuses(record(R"("F6_E2M3")", "[4]", "[0,3]"), "not supported", 3);
  refuses(record(R"("f32")", "[2]", "[0,8]"), "not supported");
  refuses(record(R"("F4")", "[3]", "[0,8]"), "whole bytes");
  refuses(record("1", "[2]", "[0,8]"), "where none belongs");
  refuses(record(R"("F32")", "[2.0]", "[0,8]"), "whole 64-bit");
  refuses(record(R"("F32")", "[-2]", "[0,8]"), "negative");
  refuses(record(R"("F32")", "[2,[1]]", "[0,8]"), "where none belongs");
  refuses(record(R"("F32")", "[2,{}]", "[0,8]"), "where none belongs");
  refuses(record(R"("F32")", "[true]", "[0,8]"), "where none belongs");
  refuses(record(R"("F32")", "{}", "[0,8]"), "where none belongs");
  refuses(record(R"("F32")", "[340282366920938463463374607431768211456]", "[0,8]"), "whole 64-bit");
  refuses(record(R"("F32")", "[18446744073709551615]", "[0,8]"), "63 bits");
  refuses(record(R"("F32")", "[2]", "[0]"), "two data_offsets");
  refuses(record(R"("F32")", "[2]", "[0,8,8]"), "two data_offsets");
  refuses(record(R"("F32")", "[2]", "[8,0]"), "needs 8 bytes");
  refuses(record(R"("F32")", "[3]", "[0,8]"), "needs 12 bytes");
  // The product is 2 modulo 2^64.
  refuses(record(R"("U8")", "[4294967296,4294967296,1]", "[0,0]"), "63 bits", 0);
  refuses(record(R"("U8")", "[6148914691236517206,3]", "[0,2]"), "63 bits", 2);
  refuses(R"({"w":{"dtype":"F32","shape":[2]}})", "needs dtype");
  refuses(R"({"w":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}})", "twice");
  refuses(R"({"w":[]})", "where none belongs");
  refuses(R"({"w":7})", "where none belongs");
}

TEST_CASE("each rule of the whole header refuses what breaks it") {
  const std::string w = "\"w\":" + kGood;
  refuses("{" + w + "," + w + "}", "stands twice");
  refuses("{" + w + R"(,"\u0077":)" + kGood + "}", "stands twice");
  refuses("{" + w + "}", "the file holds 9", 9);
  refuses("{" + w + "}", "the file holds 7", 7);
  refuses("{" + w + R"(,"v":{"dtype":"U8","shape":[1],"data_offsets":[7,8]}})", "overlap");
  refuses("{" + w + R"(,"v":{"dtype":"U8","shape":[1],"data_offsets":[9,10]}})", "gap", 10);
  refuses("{" + w + R"(,"__metadata__":{"a":1}})", "where none belongs");
  refuses("{" + w + R"(,"__metadata__":{"a":{}}})", "where none belongs");
  refuses("{" + w + R"(,"__metadata__":["a"]})", "where none belongs");
  refuses("{" + w + R"(,"__metadata__":null})", "where none belongs");
  refuses("{" + w + R"(,"__metadata__":{"a":"1","a":"2"}})", "twice");
  refuses("{" + w + "} x", "header: no JSON at line 1, column ");
  refuses("{" + w + "}" + std::string("\0x", 2), "NUL");
  refuses("[]", "no JSON object");
  refuses("", "no JSON object");
  refuses("\"\xff\"", "no JSON object");
  refuses("{\"\xff\":" + kGood + "}", "header: no JSON at line 1, column 3: object key: invalid string: ill-formed UTF-8");
  refuses(R"({"w":{"x":)" + std::string(100'000, '['), "too deep");
}

TEST_CASE("hostile names do not break the sentence") {
  try {
    parse_header(R"({"a\nb\u001b[31m":7})", 0, "f");
    FAIL("accepted");
  } catch (const shard::Error& error) {
    CHECK(std::string_view(error.what()).find_first_of("\n\x1b") == std::string_view::npos);
  }
}

TEST_CASE("a file cut short or grown anywhere is refused") {
  const auto good = file_of("{\"w\":" + kGood + R"(,"v":{"dtype":"U8","shape":[3],"data_offsets":[8,11]}})",
                            std::string(11, 'x'));
  const TemporaryFile file(good);
  CHECK(read_header(file.open()).entries.size() == 2);
  for (std::size_t n = 0; n < good.size(); ++n) {
    file.write(std::string_view(good).substr(0, n));
    CHECK_THROWS_AS(read_header(file.open()), shard::Error);
  }
  file.write(good + "x");
  CHECK_THROWS_AS(read_header(file.open()), shard::Error);
  for (const std::uint64_t length : {std::uint64_t{100'000'001}, UINT64_MAX, UINT64_MAX - 7}) {
    auto bomb = good;
    std::memcpy(bomb.data(), &length, 8);
    file.write(bomb);
    CHECK_THROWS_WITH_AS(read_header(file.open()), doctest::Contains("the limit is"), shard::Error);
  }
}

TEST_CASE("one changed byte never does worse than an error") {
  const auto good = "{\"w\":" + kGood + R"(,"__metadata__":{"format":"pt"}})";
  for (std::size_t i = 0; i < good.size(); ++i)
    for (int c = 0; c < 256; ++c) {
      auto bad = good;
      bad[i] = static_cast<char>(c);
      try {
        parse_header(bad, 8, "f");
      } catch (const shard::Error& error) {
        REQUIRE(error.code == shard::Code::BadFormat);
      }
    }
}

TEST_CASE("a hundred thousand tensors take no time that grows with their square") {
  std::vector<Entry> entries;
  for (std::uint64_t i = 0; i < 100'000; ++i)
    entries.push_back({fmt::format("model.layers.{}.weight", i), DType::BF16, {1}, 2 * i, 2 * i + 2});
  const auto begin = std::chrono::steady_clock::now();
  const auto text = write_header(entries, {});
  CHECK(parse_header(std::string_view(text).substr(8), 200'000, "f").entries.size() == 100'000);
  const auto seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  MESSAGE(seconds << " s");
  CHECK(seconds < 20);  // sanitized and on a busy machine
}
