// Libraries that load late; products through cuBLASLt, against sums written down.
#include "gpu/libs/cublaslt.h"
#include "gpu/libs/library.h"
#include "libshard/error.h"
#include "libshard/numeric.h"
#include "tests/gpu/libraries.h"

#include <doctest/doctest.h>
#include <atomic>
#include <cmath>
#include <vector>

using shard::DType;

namespace {

std::string what_of(const auto& call) {
  try {
    call();
  } catch (const shard::Error& error) {
    CHECK(error.code == shard::Code::Device);
    return error.what();
  }
  return "";
}

}  // namespace

TEST_CASE("a library that is absent, or is another one, says what was tried") {
  const auto absent = what_of([] { gpu::Library("cuNothing", "", {"libcunothing.so.9", "libcunothing.so"}); });
  CHECK(absent.starts_with("cuNothing: could not be loaded: libcunothing.so.9 (cannot open shared object file"));
  CHECK(absent.find(", libcunothing.so (") != std::string::npos);
  CHECK(absent.find('\n') == std::string::npos);
  CHECK(what_of([] { gpu::Library("cuNothing", "/nowhere/x.so", {"libc.so.6"}); }).find("/nowhere/x.so (") != std::string::npos);
  const gpu::Library libc("C", "", {"libcunothing.so", "libc.so.6"});
  std::size_t (*length)(const char*) = nullptr;
  libc.resolve(length, "strlen");
  CHECK(length("four") == 4);
  CHECK(what_of([&] { libc.resolve(length, "strlong"); }) == "C (libc.so.6): has no strlong; too old?");
}

#ifdef SHARDKIT_LIBRARIES

namespace {

/// Numbers in device memory, as rows with a pitch in front of which `before` elements lie.
struct Matrix {
  Matrix(std::int64_t count, DType type, int seed) : type(type), values(static_cast<std::size_t>(count)), memory(values.size() * size_of(type)) {
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(static_cast<int>((i * 7 + static_cast<std::size_t>(seed) * 13) % 17) - 8) / 8;  // exact in every type but e5m2
    put();
  }
  void put() {
    std::vector<std::byte> bytes(memory.size());
    shard::cast(std::as_bytes(std::span(values)), DType::F32, bytes, type);
    shard::cast(bytes, type, std::as_writable_bytes(std::span(values)), DType::F32);
    gpu::Stream stream;
    gpu::to_device(memory.data(), bytes.data(), bytes.size(), stream);
    stream.wait();
  }
  std::vector<float> get(const gpu::Stream& stream) const {
    std::vector<std::byte> bytes(memory.size());
    gpu::to_host(bytes.data(), memory.data(), bytes.size(), stream);
    stream.wait();
    std::vector<float> out(values.size());
    shard::cast(bytes, type, std::as_writable_bytes(std::span(out)), DType::F32);
    return out;
  }
  DType type;
  std::vector<float> values;
  gpu::DeviceBuffer memory;
};

/// out[t, n] as the header says it, element by element in row-major terms; the rest of `out` as it was.
std::vector<float> wanted(const gpu::MatmulShape& s, const Matrix& x, const Matrix& w, const Matrix* bias, const Matrix& out, float alpha, float beta) {
  auto values = out.values;
  for (std::int64_t b = 0; b < s.batch; ++b)
    for (std::int64_t t = 0; t < s.rows; ++t)
      for (std::int64_t n = 0; n < s.columns; ++n) {
        double sum = 0;
        for (std::int64_t k = 0; k < s.inner; ++k)
          sum += static_cast<double>(x.values[static_cast<std::size_t>(b * s.x_step + t * s.x_pitch + k)]) *
                 static_cast<double>(w.values[static_cast<std::size_t>(b * s.w_step + (s.w_by_inner ? k * s.w_pitch + n : n * s.w_pitch + k))]);
        auto& to = values[static_cast<std::size_t>(b * s.out_step + t * s.out_pitch + n)];
        to = static_cast<float>(alpha * sum + beta * to + (bias ? bias->values[static_cast<std::size_t>(n)] : 0.0f));
      }
  std::vector<std::byte> bytes(values.size() * size_of(s.out_type));
  shard::cast(std::as_bytes(std::span(values)), DType::F32, bytes, s.out_type);
  shard::cast(bytes, s.out_type, std::as_writable_bytes(std::span(values)), DType::F32);
  return values;
}

void check_product(gpu::Matmul& matmul, const gpu::MatmulShape& s, float alpha = 1, float beta = 0) {
  const auto rows_of_w = s.w_by_inner ? s.inner : s.columns;
  const Matrix x((s.batch - 1) * s.x_step + s.rows * s.x_pitch, s.type, 1), w((s.batch - 1) * s.w_step + rows_of_w * s.w_pitch, s.w_type, 2), bias(s.columns, s.out_type, 3);
  Matrix out((s.batch - 1) * s.out_step + s.rows * s.out_pitch, s.out_type, 4);
  const auto want = wanted(s, x, w, s.bias ? &bias : nullptr, out, alpha, beta);
  gpu::Stream stream;
  matmul(s, {.x = x.memory.data(), .w = w.memory.data(), .bias = bias.memory.data(), .out = out.memory.data(), .alpha = alpha, .beta = beta}, stream);
  CHECK(out.get(stream) == want);
}

gpu::MatmulShape dense(std::int64_t rows, std::int64_t columns, std::int64_t inner, DType type, DType out) {
  return {.rows = rows, .columns = columns, .inner = inner, .type = type, .out_type = out, .x_pitch = inner, .w_pitch = inner, .out_pitch = columns, .w_type = type};
}

}  // namespace

TEST_CASE("products: rows with pitches, transposes, bias, batches, alpha and beta, in every pair of types") {
  gpu::Matmul matmul(0, libraries::cublaslt());
#ifndef SHARDKIT_ON_DEVICE
  CHECK(matmul.version() == "13.0.0");
#endif
  for (const auto type : {DType::BF16, DType::F16, DType::F32})
    for (const auto out : {type, DType::F32}) {
      CAPTURE(shard::name(type));
      CAPTURE(shard::name(out));
      auto s = dense(5, 3, 7, type, out);
      check_product(matmul, s);
      s.bias = true;
      check_product(matmul, s);
      s.x_pitch = 9, s.w_pitch = 11, s.out_pitch = 4;
      check_product(matmul, s, 0.5f, 1);
      s.w_by_inner = true, s.w_pitch = 5;
      check_product(matmul, s);
      s.bias = false, s.batch = 3, s.x_step = 50, s.w_step = 40, s.out_step = 21;
      check_product(matmul, s, 0.25f);
      s.w_by_inner = false, s.w_step = 0, s.w_pitch = 8;  // several heads of queries over one of keys
      check_product(matmul, s, 1, 2);
    }
}

TEST_CASE("fp8 products take a scale of each operand; what fp8 cannot do is refused by name") {
  gpu::Matmul matmul(0, libraries::cublaslt());
  gpu::Stream stream;
  auto s = dense(16, 32, 64, DType::F8E4M3, DType::BF16);
  check_product(matmul, s);
  const Matrix x(16 * 64, s.type, 1), w(32 * 64, s.w_type, 2);
  Matrix out(16 * 32, DType::BF16, 4), half(1, DType::F32, 5), four(1, DType::F32, 5);
  half.values = {0.5f}, four.values = {4};
  half.put(), four.put();
  const auto factor = [](const Matrix& one) { return reinterpret_cast<const float*>(one.memory.data()); };
  matmul(s, {.x = x.memory.data(), .w = w.memory.data(), .out = out.memory.data(), .x_scale = factor(half), .w_scale = factor(four)}, stream);
  CHECK(out.get(stream) == wanted(s, x, w, nullptr, out, 2, 0));
  matmul(s, {.x = x.memory.data(), .w = w.memory.data(), .out = out.memory.data()}, stream);  // and no scale is left behind
  CHECK(out.get(stream) == wanted(s, x, w, nullptr, out, 1, 0));

  const auto refused = [&](gpu::MatmulShape shape, const char* why) {
    CAPTURE(why);
    CHECK(what_of([&] { matmul(shape, {.x = x.memory.data(), .w = w.memory.data(), .out = out.memory.data()}, stream); }).find(why) != std::string::npos);
  };
  auto bad = s;
  bad.type = DType::F8E5M2;
  refused(bad, "f8_e5m2 operands");
  bad = s, bad.type = DType::BF16;
  refused(bad, "fp8 multiplies only with fp8");
  bad = s, bad.inner = 24, refused(bad, "16 divides");
  bad = s, bad.w_by_inner = true, refused(bad, "stored [n, k]");
  bad = s, bad.out_type = DType::F8E4M3, refused(bad, "output cannot be fp8");
  bad = dense(2, 2, 2, DType::BF16, DType::BF16), bad.w_type = DType::F32, refused(bad, "one type");
  bad = dense(2, 2, 2, DType::BF16, DType::BF16), bad.x_pitch = 1, refused(bad, "rows overlap");
  bad = dense(2, 0, 2, DType::BF16, DType::BF16), refused(bad, "no elements");
  bad = dense(2, 2, 2, DType::BF16, DType::F16), refused(bad, "[2, 2] bf16 × [2, 2] bf16 → f16 on ");
#ifndef SHARDKIT_ON_DEVICE
  refused(bad, "f16 on emulated on the host: not supported");
#endif
  bad = dense(2, 2, 2, DType::I32, DType::F16), refused(bad, "i32 is no type of a product");
}

TEST_CASE("tf32 only where it is asked for") {
  gpu::Matmul matmul(0, libraries::cublaslt());
  gpu::Stream stream;
  constexpr std::int64_t n = 128;  // a size at which libraries choose tensor cores
  Matrix x(n * n, DType::F32, 0), w(n * n, DType::F32, 0), out(n * n, DType::F32, 0);
  for (std::size_t i = 0; i < x.values.size(); ++i) x.values[i] = w.values[i] = 1 + 0x1p-14f;  // one in tf32
  x.put(), w.put();
  auto s = dense(n, n, n, DType::F32, DType::F32);
  const auto product = [&] {
    matmul(s, {.x = x.memory.data(), .w = w.memory.data(), .out = out.memory.data()}, stream);
    return static_cast<double>(out.get(stream)[7]) / n;
  };
  CHECK(std::abs(product() - (1 + 0x1p-13)) < 0x1p-18);
  s.tf32 = true;
  CHECK(product() == 1);
}

#ifndef SHARDKIT_ON_DEVICE  // the double counts

TEST_CASE("a shape is searched for once; addresses that are less aligned are another search; a graph records the call") {
  const auto path = libraries::cublaslt();
  auto& made = doubles::variable<std::atomic<int>>(path, "fake_made");
  gpu::Matmul matmul(0, path);
  gpu::Stream stream;
  auto s = dense(4, 4, 8, DType::BF16, DType::BF16);
  s.bias = true;
  Matrix x(64, DType::BF16, 1);
  const Matrix w(32, DType::BF16, 2), bias(4, DType::BF16, 3), other(4, DType::BF16, 9);
  Matrix out(16, DType::BF16, 4);
  const auto call = [&](std::int64_t first, const Matrix& with) {
    matmul(s, {.x = x.memory.data() + 2 * first, .w = w.memory.data(), .bias = with.memory.data(), .out = out.memory.data()}, stream);
  };
  call(0, bias);
  const int after_first = made;
  call(0, other);
  CHECK(out.get(stream) == wanted(s, x, w, &other, out, 1, 0));
  CHECK(made == after_first);
  call(1, bias);
  stream.wait();
  CHECK(made > after_first);
  const int before_graph = made;
  gpu::Graph::begin(stream);
  call(0, bias);
  const auto graph = gpu::Graph::end(stream);
  for (const float value : {0.5f, 2.0f}) {
    x.values.assign(64, value);
    x.put();
    graph.launch(stream);
    CHECK(out.get(stream) == wanted(s, x, w, &bias, out, 1, 0));
  }
  CHECK(made == before_graph);
}

#endif

#endif
