#include "libshard/dtype.h"

#include <doctest/doctest.h>

using namespace shard;

TEST_CASE("every type is found by each of its spellings") {
  for (int i = 0; i <= static_cast<int>(DType::C128); ++i) {
    const auto dtype = static_cast<DType>(i);
    CHECK(dtype_named(name(dtype)) == dtype);
    CHECK(dtype_named(torch_name(dtype)) == dtype);
    if (!safetensors_name(dtype).empty()) CHECK(dtype_named(safetensors_name(dtype)) == dtype);
  }
  CHECK(safetensors_name(DType::C128).empty());
  CHECK_FALSE(dtype_named(""));
  CHECK_FALSE(dtype_named("float128"));
  CHECK_FALSE(dtype_named("F6_E2M3"));
}

TEST_CASE("names and sizes, spot by spot") {
  CHECK(torch_name(DType::F8E8M0) == "float8_e8m0fnu");
  CHECK(safetensors_name(DType::F4E2M1x2) == "F4");
  CHECK(name(DType::BF16) == "bf16");
  CHECK(size_of(DType::F4E2M1x2) == 1);
  CHECK(size_of(DType::C128) == 16);
}
