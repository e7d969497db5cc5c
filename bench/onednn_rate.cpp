// Seconds that oneDNN alone takes for the matrix products of one forward pass: weights laid out as it likes best, and as checkpoints hold them.
// usage: onednn_rate f32|bf16 TOKENS LAYERS HIDDEN FFN HEADS GROUPS VOCAB     prints the best of three passes of both,
// or nan nan where oneDNN has no such products on this processor
#include <dnnl.hpp>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

using dnnl::memory;

struct Product {
  dnnl::matmul run;
  memory a, b, c;
};

double measure(char** argv, memory::format_tag weights) {
  const auto number = [&](int i) { return std::atol(argv[i]); };
  const auto type = std::strcmp(argv[1], "bf16") == 0 ? memory::data_type::bf16 : memory::data_type::f32;
  const long tokens = number(2), layers = number(3), hidden = number(4), ffn = number(5), kv = hidden / number(6) * number(7), vocab = number(8);
  dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  dnnl::stream stream(engine);
  std::vector<Product> products;
  const auto add = [&](long k, long n) {
    const memory::desc a({tokens, k}, type, memory::format_tag::ab), b({k, n}, type, weights), c({tokens, n}, type, memory::format_tag::ab);
    const dnnl::matmul::primitive_desc description(dnnl::matmul::desc(a, b, c), engine);
    Product product{dnnl::matmul(description), memory(a, engine), memory(description.weights_desc(), engine), memory(c, engine)};
    std::memset(product.a.get_data_handle(), 0x3c, product.a.get_desc().get_size());
    std::memset(product.b.get_data_handle(), 0x3c, product.b.get_desc().get_size());
    products.push_back(product);
  };
  for (long layer = 0; layer < layers; ++layer) {
    add(hidden, hidden + 2 * kv);
    add(hidden, hidden);
    add(hidden, 2 * ffn);
    add(ffn, hidden);
  }
  add(hidden, vocab);
  double best = 1e9;
  for (int pass = 0; pass < 4; ++pass) {
    const auto start = std::chrono::steady_clock::now();
    for (auto& product : products) product.run.execute(stream, {{DNNL_ARG_SRC, product.a}, {DNNL_ARG_WEIGHTS, product.b}, {DNNL_ARG_DST, product.c}});
    stream.wait();
    const auto seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    if (pass > 0 && seconds < best) best = seconds;
  }
  return best;
}

int main(int argc, char** argv) {
  if (argc != 9) return 2;
  try {
    const auto best = measure(argv, memory::format_tag::any), stored = measure(argv, memory::format_tag::ba);
    std::printf("%.4f %.4f\n", best, stored);
  } catch (const dnnl::error& error) {
    if (error.status != dnnl_unimplemented) throw;
    std::printf("nan nan\n");
  }
  return 0;
}
