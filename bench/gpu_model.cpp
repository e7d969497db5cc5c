// A language model on one device: its whole forward pass, the products in it alone, each attention backend, and an MTP step with and without
// its graph. Weights and tokens are noise: no checkpoint is needed.
// usage: gpu_model [--layers N] [--hidden N] [--ffn N] [--heads N] [--groups N] [--vocab N] [--batch N] [--length N] [--rounds N] [--device N]
// prints one JSON object; seconds are the median of the rounds, behind two that warm up. The defaults are TinyLlama 1.1B's, 8 × 2048 tokens, bf16.
#include "formats/kernels.h"
#include "gpu/libs/cublaslt.h"
#include "gpu/model/device_ops.h"
#include "gpu/model/load_weights.h"
#include "gpu/ops/linear.h"
#include "libshard/error.h"
#include "lm/language_module.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstring>
#include <mutex>

namespace {

using lm::AttentionBackend;
using lm::Index;
using shard::DType;

struct Ask {
  Index layers = 22, hidden = 2048, ffn = 5632, heads = 32, groups = 4, vocab = 32000, batch = 8, length = 2048, rounds = 10, device = 0;
  Index rows() const { return batch * length; }
  Index head() const { return hidden / heads; }
};

Ask read_arguments(int argc, char** argv) {
  Ask out;
  const std::map<std::string, Index*> known{{"--layers", &out.layers}, {"--hidden", &out.hidden}, {"--ffn", &out.ffn},       {"--heads", &out.heads},   {"--groups", &out.groups},
                                            {"--vocab", &out.vocab},   {"--batch", &out.batch},   {"--length", &out.length}, {"--rounds", &out.rounds}, {"--device", &out.device}};
  for (int i = 1; i < argc; i += 2) {
    const auto found = known.find(argv[i]);
    shard::require(found != known.end() && i + 1 < argc, shard::Code::Usage, [&] { return fmt::format("{}: is not known, or lacks its number", argv[i]); });
    char* end = nullptr;
    *found->second = std::strtoll(argv[i + 1], &end, 10);
    shard::require(end != argv[i + 1] && *end == 0 && *found->second >= (found->second == &out.device ? 0 : 1), shard::Code::Usage,
                   [&] { return fmt::format("{} {}: should be a positive number", argv[i], argv[i + 1]); });
  }
  shard::require(out.hidden % out.heads == 0 && out.heads % out.groups == 0, shard::Code::Usage,
                 [&] { return fmt::format("{} heads in {} groups over {} lanes: do not divide", out.heads, out.groups, out.hidden); });
  return out;
}

/// bf16 of a normal distribution, σ = 0.02; the rate of products depends on what the bits are.
const std::vector<std::uint16_t>& noise() {
  static const auto made = [] {
    std::vector<std::uint16_t> out(1 << 20);
    std::uint64_t state = 0x9e3779b97f4a7c15ull;
    for (auto& bits : out) {
      double sum = -6;
      for (int i = 0; i < 12; ++i) {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        sum += static_cast<double>(state >> 11) * 0x1p-53;
      }
      bits = static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(static_cast<float>(0.02 * sum)) >> 16);
    }
    return out;
  }();
  return made;
}

/// `into` from `offset` of an endless repetition of it.
void copy_noise(std::uint64_t offset, std::span<std::byte> into) {
  const auto& from = noise();
  const auto size = from.size() * sizeof(from[0]);
  for (std::size_t at = 0; at < into.size();) {
    const auto begin = (offset + at) % size, part = std::min(into.size() - at, size - begin);
    std::memcpy(into.data() + at, reinterpret_cast<const std::byte*>(from.data()) + begin, part);
    at += part;
  }
}

gpu::DeviceBuffer noisy(std::uint64_t bytes, gpu::StreamView on) {
  gpu::DeviceBuffer out(bytes);
  const auto size = noise().size() * sizeof(noise()[0]);
  for (std::uint64_t at = 0; at < bytes; at += size) gpu::to_device(out.data() + at, noise().data(), std::min<std::uint64_t>(size, bytes - at), on);
  gpu::wait(on);
  return out;
}

/// A model's configuration and its weights' names and shapes.
struct Shape {
  shard::TransformerConfig config;
  std::vector<std::pair<std::string, shard::Shape>> weights;

  void add(const std::string& name, shard::Shape shape) { weights.emplace_back(name + ".weight", std::move(shape)); }
  void norms(std::initializer_list<std::string> names, Index width) {
    for (const auto& name : names) add(name, {width});
  }
  void feed_forward(const std::string& prefix, Index hidden, Index ffn) {
    add(prefix + "gate", {ffn, hidden}), add(prefix + "up", {ffn, hidden}), add(prefix + "down", {hidden, ffn});
  }
  /// All but the layers themselves, each of which is one of `layer`.
  void around(Index layers, Index hidden, Index vocab, const shard::LayerConfig& layer) {
    norms({"mtp.0.enorm", "mtp.0.hnorm", "mtp.0.final_norm", "final_norm"}, hidden);
    add("mtp.0.eh_proj", {hidden, 2 * hidden}), add("embedding.word", {vocab, hidden}), add("output", {vocab, hidden});
    config.num_layers = layers, config.hidden_size = hidden, config.vocab_size = vocab, config.mtp_num_layers = 1;
    config.layers.assign(static_cast<std::size_t>(layers), layer);
  }
};

/// A Llama and one MTP layer more.
Shape llama(const Ask& ask) {
  Shape out;
  const auto kv = ask.groups * ask.head();
  const auto layer = [&](const std::string& prefix) {
    out.norms({prefix + "attention.norm", prefix + "mlp.norm"}, ask.hidden);
    out.add(prefix + "attention.q", {ask.hidden, ask.hidden}), out.add(prefix + "attention.out", {ask.hidden, ask.hidden});
    out.add(prefix + "attention.k", {kv, ask.hidden}), out.add(prefix + "attention.v", {kv, ask.hidden});
    out.feed_forward(prefix + "mlp.", ask.hidden, ask.ffn);
  };
  for (Index l = 0; l < ask.layers; ++l) layer(fmt::format("layers.{}.", l));
  layer("mtp.0.layer.");
  out.around(ask.layers, ask.hidden, ask.vocab, {.softmax_scale = 1 / std::sqrt(static_cast<double>(ask.head()))});
  auto& config = out.config;
  config.family = "llama";
  config.ffn_hidden_size = ask.ffn, config.num_attention_heads = ask.heads, config.num_query_groups = ask.groups, config.kv_channels = ask.head();
  config.max_position_embeddings = ask.length;
  config.rope.type = shard::RopeConfig::Type::Default, config.rope.dim = ask.head();
  return out;
}

/// One layer of DeepSeek-V3 and its MTP layer, with `experts` of its 256 experts; sides are divided by `by`.
Shape deepseek(Index experts, Index by) {
  Shape out;
  const Index hidden = 7168 / by, heads = 128 / by, nope = 128, turned = 64, q_lora = 1536 / by, kv_lora = 512, ffn = 2048 / by;
  const auto layer = [&](const std::string& prefix) {
    out.norms({prefix + "attention.norm", prefix + "mlp.norm"}, hidden), out.norms({prefix + "attention.q_norm"}, q_lora), out.norms({prefix + "attention.kv_norm"}, kv_lora);
    out.add(prefix + "attention.q_down", {q_lora, hidden}), out.add(prefix + "attention.q_up", {heads * (nope + turned), q_lora});
    out.add(prefix + "attention.kv_down", {kv_lora + turned, hidden}), out.add(prefix + "attention.kv_up", {heads * 2 * nope, kv_lora});
    out.add(prefix + "attention.out", {hidden, heads * nope}), out.add(prefix + "mlp.router", {experts, hidden});
    for (Index e = 0; e < experts; ++e) out.feed_forward(fmt::format("{}mlp.experts.{}.", prefix, e), hidden, ffn);
    out.feed_forward(prefix + "mlp.shared.", hidden, ffn);
  };
  layer("layers.0."), layer("mtp.0.layer.");
  out.around(1, hidden, 129280 / by, {.moe = true, .softmax_scale = 1 / std::sqrt(static_cast<double>(nope + turned))});
  auto& config = out.config;
  config.family = "deepseek_v3";
  config.multi_latent_attention = true;
  config.num_attention_heads = config.num_query_groups = heads, config.kv_channels = nope;
  config.q_lora_rank = q_lora, config.kv_lora_rank = kv_lora, config.qk_head_dim = config.v_head_dim = nope, config.qk_pos_emb_head_dim = turned;
  config.num_experts = experts, config.moe_ffn_hidden_size = config.moe_shared_expert_size = config.ffn_hidden_size = ffn;
  config.router.score = shard::RouterConfig::Score::Sigmoid, config.router.renormalize = true, config.router.topk = std::min<Index>(8, experts), config.router.scaling = 2.5;
  config.max_position_embeddings = 4096;
  config.rope.type = shard::RopeConfig::Type::Default, config.rope.dim = turned;
  return out;
}

/// That model as a checkpoint in no file.
class NoiseModel final : public shard::Reader {
 public:
  explicit NoiseModel(const Shape& shape) {
    for (const auto& [name, sides] : shape.weights) add(name, sides);
  }
  const shard::ShardedStateDict& describe() const override { return dict_; }
  void read(std::uint32_t, std::uint64_t offset, std::span<std::byte> into) const override { copy_noise(offset, into); }
  std::optional<shard::FileRange> file_range(std::uint32_t) const override { return std::nullopt; }

 private:
  void add(const std::string& name, const shard::Shape& shape) {
    auto stride = shard::row_major(shape);
    for (auto& step : stride) step *= 2;
    const auto stream = static_cast<std::uint32_t>(dict_.streams.size());
    auto& fresh = dict_.streams.emplace_back();
    fresh.size = static_cast<std::uint64_t>(shard::volume(shape)) * 2;
    shard::Shard whole;
    whole.box = {shard::Shape(shape.size(), 0), shape};
    whole.place = {stream, 0, stride};
    dict_.tensors[name] = {name, DType::BF16, shape, shape, {whole}};
  }
  shard::ShardedStateDict dict_{{"noise"}, {}, {}, {}, {}};
};

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2), values.end());
  return values[values.size() / 2];
}

class Bench {
 public:
  explicit Bench(const Ask& ask) : ask_(ask) {}

  std::string run(const gpu::DeviceInfo& info) {
    std::string out = fmt::format("{{\"device\": \"{}\", \"emulated\": {}, \"shape\": {{\"layers\": {}, \"hidden\": {}, \"ffn\": {}, \"heads\": {}, \"groups\": {}, \"vocab\": {}, \"batch\": {}, \"length\": {}}}, "
                                  "\"rounds\": {}, \"product_flops\": {:.0f}",
                                  info.name, gpu::is_emulated(), ask_.layers, ask_.hidden, ask_.ffn, ask_.heads, ask_.groups, ask_.vocab, ask_.batch, ask_.length, ask_.rounds, flops());
    out += fmt::format(", \"products\": {}, \"attention\": {}, {}", products(), attention(), model(llama(ask_), lm::Compute::Bf16, true));
    out += fmt::format(", \"fp8\": {{{}}}", model(llama(ask_), lm::Compute::Fp8, true));
    const auto moe = deepseek(gpu::is_emulated() ? 4 : 32, gpu::is_emulated() ? 32 : 1);
    out += fmt::format(", \"deepseek\": {{{}}}, \"deepseek_fp8\": {{{}}}}}", model(moe, lm::Compute::Bf16, false), model(moe, lm::Compute::Fp8, false));
    return out;
  }

 private:
  struct Product {
    Index columns, inner;
    Index times;
  };
  /// As the layers ask for them; `joined`: q, k and v as one, and gate and up.
  std::vector<Product> list(bool joined) const {
    const auto kv = ask_.groups * ask_.head(), h = ask_.hidden;
    auto out = joined ? std::vector<Product>{{h + 2 * kv, h, ask_.layers}, {2 * ask_.ffn, h, ask_.layers}}
                      : std::vector<Product>{{h, h, ask_.layers}, {kv, h, 2 * ask_.layers}, {ask_.ffn, h, 2 * ask_.layers}};
    out.push_back({h, h, ask_.layers});
    out.push_back({h, ask_.ffn, ask_.layers});
    out.push_back({ask_.vocab, h, 1});
    return out;
  }
  double flops() const {
    double out = 0;
    for (const auto& p : list(false)) out += 2.0 * static_cast<double>(ask_.rows()) * static_cast<double>(p.columns) * static_cast<double>(p.inner) * static_cast<double>(p.times);
    return out;
  }

  /// Seconds of `work` by the device's clock.
  double seconds(gpu::StreamView on, const std::function<void()>& work) const {
    std::vector<double> out;
    for (Index round = -2; round < ask_.rounds; ++round) {
      gpu::Event start, end;
      start.record(on);
      work();
      end.record(on);
      end.wait();
      if (round >= 0) out.push_back(static_cast<double>(end.since(start)) / 1e3);
    }
    return median(out);
  }
  /// Seconds by the host's clock; `work` waits for the device.
  double waited(const std::function<void()>& work) const {
    std::vector<double> out;
    for (Index round = -3; round < ask_.rounds; ++round) {  // a step is recorded the second time
      const auto start = std::chrono::steady_clock::now();
      work();
      if (round >= 0) out.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    return median(out);
  }
  /// {"seconds": …} or {"why": …}.
  static std::string told(const std::function<double()>& measure) {
    try {
      return fmt::format("{{\"seconds\": {:.9f}}}", measure());
    } catch (const shard::Error& error) {
      std::string why = error.what();
      std::replace_if(why.begin(), why.end(), [](unsigned char c) { return c == '"' || c == '\\' || c < ' '; }, '\'');
      return fmt::format("{{\"why\": \"{}\"}}", why);
    }
  }

  std::string products() {
    const gpu::Stream stream;
    const auto widest = std::max({ask_.hidden + 2 * ask_.groups * ask_.head(), 2 * ask_.ffn, ask_.vocab});
    const auto x = noisy(2 * static_cast<std::uint64_t>(ask_.rows() * std::max(ask_.hidden, ask_.ffn)), stream);
    std::uint64_t elements = 0;  // all weights of a layer and the head have places of their own: they do not stay in caches
    for (const auto& p : list(false)) elements += static_cast<std::uint64_t>(p.columns * p.inner * std::max<Index>(1, p.times / ask_.layers));
    const auto w = noisy(2 * elements, stream);
    const gpu::DeviceBuffer out(2 * static_cast<std::size_t>(ask_.rows() * widest));
    const auto all = [&](bool joined, const auto& product) {
      const auto products = list(joined);
      const auto run = [&](const Product& p, std::uint64_t& at, Index times) {
        for (Index i = 0; i < times; ++i, at += 2 * static_cast<std::uint64_t>(p.columns * p.inner)) product(p, w.data() + at);
      };
      std::uint64_t end = 0;
      for (Index l = 0; l < ask_.layers; ++l) {
        std::uint64_t at = 0;
        for (std::size_t i = 0; i + 1 < products.size(); ++i) run(products[i], at, products[i].times / ask_.layers);
        end = at;
      }
      run(products.back(), end, 1);
    };
    const auto by_library = [&](bool joined) {
      return told([&] {
        shard::require(!gpu::is_emulated(), shard::Code::Device, [] { return std::string("the device is emulated"); });
        gpu::Matmul matmul(static_cast<int>(ask_.device));
        return seconds(stream, [&] {
          all(joined, [&](const Product& p, std::byte* weight) {
            gpu::MatmulShape shape;
            shape.rows = ask_.rows(), shape.columns = shape.out_pitch = p.columns, shape.inner = shape.x_pitch = shape.w_pitch = p.inner;
            matmul(shape, {x.data(), weight, nullptr, out.data()}, stream);
          });
        });
      });
    };
    const auto own = told([&] {
      return seconds(stream, [&] {
        all(false, [&](const Product& p, std::byte* weight) {
          gpu::linear(stream, {x.data(), DType::BF16, ask_.rows(), p.inner, p.inner}, {weight, DType::BF16, p.columns, p.inner, p.inner}, {},
                      {out.data(), DType::BF16, ask_.rows(), p.columns, p.columns});
        });
      });
    });
    return fmt::format("{{\"cublaslt\": {}, \"cublaslt_joined\": {}, \"own\": {}}}", by_library(false), by_library(true), own);
  }

  gpu::OpsOptions options(AttentionBackend attention, bool graphs) const {
    gpu::OpsOptions out;
    out.device = static_cast<int>(ask_.device), out.compute = lm::Compute::Bf16, out.attention = attention, out.graphs = graphs;
    return out;
  }

  std::string attention() {
    const lm::AttentionShape shape{ask_.batch, ask_.length, ask_.heads, ask_.heads / ask_.groups, 0, ask_.head(), ask_.head(), 1 / std::sqrt(static_cast<double>(ask_.head()))};
    std::string out;
    for (const auto& [name, backend] : {std::pair{"local", AttentionBackend::Local}, {"flash", AttentionBackend::Flash}, {"unfused", AttentionBackend::Unfused}, {"fused", AttentionBackend::Fused}}) {
      const auto found = told([&] {
        shard::require(backend != AttentionBackend::Fused || !gpu::is_emulated(), shard::Code::Device, [] { return std::string("the device is emulated"); });
        gpu::DeviceOps ops(options(backend, true));
        const auto filled = [&](Index columns) {
          auto tensor = ops.make(ask_.rows(), columns);
          const auto from = noisy(2 * static_cast<std::uint64_t>(ask_.rows() * columns), ops.stream());
          gpu::on_device(tensor.data(), from.data(), from.size(), ops.stream());
          ops.finish();
          return tensor;
        };
        const auto q = filled(ask_.hidden), k = filled(ask_.groups * ask_.head()), v = filled(ask_.groups * ask_.head());
        return seconds(ops.stream(), [&] { ops.attention(shape, q, k, v, {}); });
      });
      out += fmt::format("{}\"{}\": {}", out.empty() ? "{" : ", ", name, found);
    }
    return out + "}";
  }

  static std::vector<Index> numbers(Index count, Index below) {
    std::vector<Index> out;
    for (Index i = 0; i < count; ++i) out.push_back((i * 7919 + 13) % below);
    return out;
  }

  /// The whole pass, its losses and statistics included, on weights that are there, unless only steps are asked for; then a step at a time.
  std::string model(const Shape& shape, lm::Compute compute, bool passes) {
    const NoiseModel checkpoint(shape);
    const auto& config = shape.config;
    lm::WeightSource source(checkpoint, formats::kernels(), compute);
    auto recorded = options(AttentionBackend::Auto, true), launched = options(AttentionBackend::Auto, false);
    recorded.compute = launched.compute = compute;
    gpu::DeviceOps recording(recorded), plain(launched);
    lm::Group alone(1);
    lm::LocalComm comm(alone, 0);
    lm::LanguageModule module(config, source, lm::placement_of(config, 0, 1), comm, comm, recording), one_by_one(config, source, lm::placement_of(config, 0, 1), comm, comm, plain);
    auto uses = module.weight_uses(0, true);
    for (auto& use : uses) use.times = 1;
    gpu::Resident held;
    {
      lm::WeightStream stream(source, uses, 1 << 30, nullptr);
      const lm::StagePlan plan{uses, {}, {lm::parts_of(config, source, uses, {})}, {}};
      held.hold(plan.parts[0], recording.stream());
      gpu::load_weights(stream, plan, 0, held, nullptr, recording.stream());
    }
    gpu::RankWeights weights(held, recording), plain_weights(held, plain);
    std::string forward = "{\"why\": \"not asked for\"}";
    if (passes) {
      lm::Batch batch{ask_.batch, ask_.length, numbers(ask_.rows(), config.vocab_size), numbers(ask_.rows(), config.vocab_size), {}};
      for (Index i = 0; i < ask_.rows(); ++i) batch.position_ids.push_back(i % ask_.length);
      const std::vector<lm::MtpStep> none;
      forward = told([&] {
        return waited([&] {
          lm::ForwardResult result;
          std::mutex mutex;
          module.forward(weights, {batch, none, config.vocab_size, config.vocab_size, {}, false}, result, mutex);
        });
      });
    }
    std::string steps;
    for (const Index rows : {1, 8}) {
      lm::MtpStep step{0, lm::Tensor(rows, config.hidden_size), numbers(rows, config.vocab_size), numbers(rows, config.max_position_embeddings)};
      for (Index i = 0; i < rows * config.hidden_size; ++i) step.in_hidden.row(0)[i] = static_cast<float>(std::sin(static_cast<double>(i)));
      const auto timed = [&](lm::LanguageModule& by, gpu::RankWeights& with, gpu::DeviceOps& ops) {
        return told([&] {
          return waited([&] {
            const auto out = by.compute_mtp_single_step(with, step);
            ops.finish();
          });
        });
      };
      const auto graph = timed(module, weights, recording);
      steps += fmt::format("{}\"{}\": {{\"graph\": {}, \"one_by_one\": {}}}", steps.empty() ? "{" : ", ", rows, graph, timed(one_by_one, plain_weights, plain));
    }
    return fmt::format("\"notes\": \"{}\", \"forward\": {}, \"step\": {}}}", recording.notes().back(), forward, steps);
  }

  Ask ask_;
};

}  // namespace

int main(int argc, char** argv) {
  try {
    const auto ask = read_arguments(argc, argv);
    const auto found = gpu::probe();
    shard::require(!found.devices.empty(), shard::Code::Device, [&] { return found.why; });
    gpu::use_device(static_cast<int>(ask.device));
    fmt::print("{}\n", Bench(ask).run(gpu::device_info(static_cast<int>(ask.device))));
    return 0;
  } catch (const shard::Error& error) {
    fmt::print(stderr, "gpu_model: {}\n", error.what());
    return static_cast<int>(error.code);
  }
}
