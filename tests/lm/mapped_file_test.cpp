// Weights in mapped files: the same as read ones, and a file that becomes shorter is an error, not the end of the process.
#include "lm/mapped_file.h"

#include "lm/look.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

namespace {

void on_lost_page(int, siginfo_t* info, void*) {
  if (!lm::mend_mapping(info->si_addr)) std::_Exit(99);
}

}  // namespace

TEST_CASE("a mapped file that becomes shorter reads as zeros and says that it is torn") {
  struct sigaction mine {}, before {};
  mine.sa_sigaction = on_lost_page;
  mine.sa_flags = SA_SIGINFO;
  sigaction(SIGBUS, &mine, &before);
  auto* file = std::tmpfile();
  std::vector<char> ones(3 * 4096, 1);
  REQUIRE(std::fwrite(ones.data(), 1, ones.size(), file) == ones.size());
  std::fflush(file);
  const auto mapped = lm::MappedFile::map({fileno(file), 0, nullptr});
  REQUIRE(mapped);
  CHECK(mapped->bytes().size() == ones.size());
  CHECK(!mapped->torn());
  REQUIRE(ftruncate(fileno(file), 4096) == 0);
  CHECK(mapped->bytes()[100] == std::byte{1});
  CHECK(!mapped->torn());
  CHECK(mapped->bytes()[2 * 4096 + 5] == std::byte{0});
  CHECK(mapped->torn());
  CHECK(!lm::mend_mapping(&ones));
  std::fclose(file);
  sigaction(SIGBUS, &before, nullptr);
}

TEST_CASE("a part that is brought lies in the system's cache") {
  auto* file = std::tmpfile();
  std::vector<char> ones(3 << 20, 1);
  REQUIRE(std::fwrite(ones.data(), 1, ones.size(), file) == ones.size());
  std::fflush(file);
  fsync(fileno(file));
  posix_fadvise(fileno(file), 0, 0, POSIX_FADV_DONTNEED);
  const auto mapped = lm::MappedFile::map({fileno(file), 0, nullptr});
  REQUIRE(mapped);
  lm::MappedFile::bring(mapped->bytes().subspan(5000));
  std::vector<unsigned char> present(ones.size() / 4096);
  REQUIRE(mincore(const_cast<std::byte*>(mapped->bytes().data()), ones.size(), present.data()) == 0);
  CHECK(std::count_if(present.begin() + 1, present.end(), [](unsigned char page) { return page & 1; }) == std::ptrdiff_t(present.size()) - 1);
  CHECK(mapped->bytes()[5000] == std::byte{1});
  std::fclose(file);
}

TEST_CASE("what cannot be mapped is left to reading") {
  CHECK(!lm::MappedFile::map({-1, 0, nullptr}));
  int ends[2];
  REQUIRE(pipe(ends) == 0);
  CHECK(!lm::MappedFile::map({ends[0], 0, nullptr}));
  close(ends[0]);
  close(ends[1]);
}

TEST_CASE("a look finds what one number is wrong, wherever it lies and with any number of threads") {
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  for (const std::size_t count : {1u, 7u, 33u, 4096u, 70001u, 600000u}) {
    std::vector<float> x(count);
    double squares = 0;
    float top = 0;
    for (auto& value : x) {
      value = normal(random);
      squares += static_cast<double>(value) * static_cast<double>(value);
      top = std::max(top, std::abs(value));
    }
    std::vector<std::uint16_t> half(count);
    for (std::size_t i = 0; i < count; ++i) half[i] = static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(x[i]) >> 16);
    const auto wide = std::as_bytes(std::span(x)), narrow = std::as_bytes(std::span(half));
    const auto one = lm::look(wide, shard::DType::F32, 1), three = lm::look(wide, shard::DType::F32, 3);
    CHECK(one.squares == three.squares);
    CHECK(one.squares == doctest::Approx(squares).epsilon(1e-5));
    CHECK(one.max_abs == top);
    CHECK(one.constant == (count == 1));
    CHECK(!one.nonfinite);
    CHECK(lm::look(narrow, shard::DType::BF16, 2).squares == doctest::Approx(squares).epsilon(2e-2));
    for (const auto at : {std::size_t{0}, count / 2, count - 1}) {
      const auto kept = x[at];
      const auto kept_half = half[at];
      x[at] = std::numeric_limits<float>::infinity();
      half[at] = 0xffc1;
      CHECK(lm::look(wide, shard::DType::F32, 2).nonfinite);
      CHECK(lm::look(narrow, shard::DType::BF16, 2).nonfinite);
      x[at] = kept;
      half[at] = kept_half;
    }
    x.assign(count, 0.5f);
    CHECK(lm::look(wide, shard::DType::F32, 3).constant);
    if (count > 1) {
      x.back() = 0.25f;
      CHECK(!lm::look(wide, shard::DType::F32, 3).constant);
    }
  }
}
