#include "libshard/numeric.h"

#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

using namespace shard;

namespace {

template <typename To, typename From>
To cast_one(From value, DType from, DType to) {
  To out{};
  cast(std::as_bytes(std::span(&value, 1)), from, std::as_writable_bytes(std::span(&out, 1)), to);
  return out;
}

}  // namespace

TEST_CASE("every 16-bit and 8-bit float survives the way to f32 and back") {
  for (const auto dtype : {DType::BF16, DType::F16})
    for (std::uint32_t bits = 0; bits < 65536; ++bits) {
      const auto wide = cast_one<float>(static_cast<std::uint16_t>(bits), dtype, DType::F32);
      const auto back = cast_one<std::uint16_t>(wide, DType::F32, dtype);
      if (std::isnan(wide)) CHECK(std::isnan(cast_one<float>(back, dtype, DType::F32)));
      else REQUIRE(back == bits);
    }
  for (const auto dtype : {DType::F8E4M3, DType::F8E5M2})
    for (std::uint32_t bits = 0; bits < 256; ++bits) {
      const auto wide = cast_one<float>(static_cast<std::uint8_t>(bits), dtype, DType::F32);
      if (!std::isnan(wide)) REQUIRE(cast_one<std::uint8_t>(wide, DType::F32, dtype) == bits);
    }
}

TEST_CASE("casts round to nearest even") {
  CHECK(cast_one<std::uint16_t>(1.00390625f, DType::F32, DType::BF16) == 0x3f80);   // half way: to even
  CHECK(cast_one<std::uint16_t>(1.01171875f, DType::F32, DType::BF16) == 0x3f82);
  CHECK(cast_one<std::uint16_t>(65520.0f, DType::F32, DType::F16) == 0x7c00);       // overflow
  CHECK(cast_one<std::uint16_t>(5.9604645e-8f / 2, DType::F32, DType::F16) == 0);   // half the smallest: to even
  CHECK(cast_one<std::uint16_t>(5.9604645e-8f * 0.75f, DType::F32, DType::F16) == 1);
  CHECK(cast_one<std::uint8_t>(448.0f, DType::F32, DType::F8E4M3) == 0x7e);
  CHECK(cast_one<std::uint8_t>(1e9f, DType::F32, DType::F8E4M3) == 0x7f);           // no infinity: NaN
  CHECK(cast_one<std::uint8_t>(1e9f, DType::F32, DType::F8E5M2) == 0x7c);
  // Through f32 this would round twice: just above half way.
  CHECK(cast_one<std::uint16_t>(1.00390625 + 1e-12, DType::F64, DType::BF16) == 0x3f81);
  CHECK_FALSE(castable(DType::I32, DType::F32));
}

TEST_CASE("what is not finite is counted and located") {
  std::vector<std::uint16_t> bf16(10'000, 0x3f80);
  CHECK(count_nonfinite(std::as_bytes(std::span(bf16)), DType::BF16).nan == 0);
  bf16[7001] = 0x7fc0;
  bf16[9000] = 0xff80;
  const auto found = count_nonfinite(std::as_bytes(std::span(bf16)), DType::BF16);
  CHECK(found.nan == 1);
  CHECK(found.inf == 1);
  CHECK(found.first == 7001);
  const double wide[] = {1, std::numeric_limits<double>::infinity()};
  CHECK(count_nonfinite(std::as_bytes(std::span(wide)), DType::F64).inf == 1);
  const std::uint8_t f8[] = {0x7f, 0x7e};
  CHECK(count_nonfinite(std::as_bytes(std::span(f8)), DType::F8E4M3).nan == 1);
}

TEST_CASE("differences in steps between neighbours") {
  const float a[] = {1.0f, 0.0f, 2.0f}, b[] = {std::nextafter(1.0f, 2.0f), -0.0f, 2.0f};
  const auto difference = compare(std::as_bytes(std::span(a)), std::as_bytes(std::span(b)), DType::F32);
  CHECK(difference.count == 2);
  CHECK(difference.first == 0);
  CHECK(difference.max_ulp == 1);
  const float c[] = {1.0f}, d[] = {-1.0f};
  CHECK(compare(std::as_bytes(std::span(c)), std::as_bytes(std::span(d)), DType::F32).max_ulp == 2u * 0x3f800000u);
  const float n[] = {std::nanf("")};
  CHECK(compare(std::as_bytes(std::span(n)), std::as_bytes(std::span(n)), DType::F32).count == 0);
  CHECK(compare(std::as_bytes(std::span(c)), std::as_bytes(std::span(n)), DType::F32).max_abs == std::numeric_limits<double>::infinity());
}
