// Every known mistake is planted in a small model in memory, and must be named; a model that differs for no known reason
// must not get a hint.
#include "libshard/hints.h"

#include "formats/hash.h"
#include "tests/libshard/memory_checkpoint.h"

#include <doctest/doctest.h>
#include <fmt/format.h>

#include <algorithm>
#include <functional>
#include <set>

using namespace shard;

namespace {

constexpr Index kHidden = 16, kHeads = 4, kGroups = 2, kHead = 8, kFfn = 24, kLayers = 8, kExperts = 8, kVocab = 40, kPadded = 48;

struct Plain {
  Shape shape;
  std::vector<float> values;
  DType dtype = DType::F32;
  bool vocabulary = false;
  Index width() const { return shape.size() < 2 ? 1 : volume(shape) / shape[0]; }
  std::vector<float> row(Index i) const { return {values.begin() + i * width(), values.begin() + (i + 1) * width()}; }
};
using Model = std::map<std::string, Plain>;

Plain noise(Shape shape, std::mt19937& random) {
  std::normal_distribution<float> normal(0, 0.1f);
  Plain out{std::move(shape), {}};
  out.values.resize(static_cast<std::size_t>(volume(out.shape)));
  for (auto& value : out.values) value = normal(random);
  return out;
}

Model model(std::uint32_t seed = 1) {
  std::mt19937 random(seed);
  Model out;
  auto& embedding = out["embedding.word.weight"] = noise({kPadded, kHidden}, random);
  embedding.vocabulary = true;
  std::fill(embedding.values.begin() + kVocab * kHidden, embedding.values.end(), 0.0f);
  for (Index l = 0; l < kLayers; ++l) {
    const auto at = fmt::format("layers.{}.", l);
    out[at + "attention.norm.weight"] = noise({kHidden}, random);
    out[at + "attention.q.weight"] = noise({kHeads * kHead, kHidden}, random);
    out[at + "attention.k.weight"] = noise({kGroups * kHead, kHidden}, random);
    out[at + "attention.v.weight"] = noise({kGroups * kHead, kHidden}, random);
    out[at + "attention.out.weight"] = noise({kHidden, kHeads * kHead}, random);
    if (l != 0) {
      out[at + "mlp.gate.weight"] = noise({kFfn, kHidden}, random);
      out[at + "mlp.up.weight"] = noise({kFfn, kHidden}, random);
      out[at + "mlp.down.weight"] = noise({kHidden, kFfn}, random);
      continue;
    }
    out[at + "mlp.router.weight"] = noise({kExperts, kHidden}, random);
    for (Index e = 0; e < kExperts; ++e) {
      out[fmt::format("{}mlp.experts.{}.up.weight", at, e)] = noise({kFfn, kHidden}, random);
      out[fmt::format("{}mlp.experts.{}.down.weight", at, e)] = noise({kHidden, kFfn}, random);
    }
  }
  return out;
}

testing::Memory stored(const Model& model) {
  ShardedStateDict dict;
  dict.files = {"memory"};
  for (const auto& [key, tensor] : model) {
    const auto item = size_of(tensor.dtype);
    Shape stride = row_major(tensor.shape);
    for (auto& step : stride) step *= static_cast<Index>(item);
    dict.tensors[key] = {key, tensor.dtype, tensor.shape, tensor.shape, {{whole(tensor.shape), {static_cast<std::uint32_t>(dict.streams.size()), 0, stride}, {}}}, tensor.vocabulary};
    dict.streams.push_back({0, 0, tensor.values.size() * item, std::nullopt, false});
  }
  testing::Memory out(std::move(dict));
  std::uint32_t stream = 0;
  for (const auto& [key, tensor] : model) {
    std::vector<std::byte> bytes(tensor.values.size() * size_of(tensor.dtype));
    cast(std::as_bytes(std::span(tensor.values)), DType::F32, bytes, tensor.dtype);
    out.write(stream++, 0, bytes);
  }
  return out;
}

std::map<std::string, std::string> hints(const Model& a, const Model& b, std::optional<Index> vocab = kVocab) {
  const Params params{{"heads", kHeads}, {"groups", kGroups}, {"head", kHead}};
  const auto left = stored(a), right = stored(b);
  const Budget budget{2};
  std::vector<Finding> findings;
  const auto different = diff_tensors(left, vocab, right, vocab, formats::kernels(), budget, findings);
  return explain({left, vocab}, {right, vocab}, different, params, formats::hash_bytes, formats::kernels(), budget);
}

Plain of_rows(const Plain& like, Index rows, const std::function<std::vector<float>(Index)>& row) {
  auto out = like;
  out.shape[0] = rows;
  out.values.clear();
  for (Index i = 0; i < rows; ++i) {
    const auto values = row(i);
    out.values.insert(out.values.end(), values.begin(), values.end());
  }
  return out;
}

Plain transposed(const Plain& from) {
  Plain out{{from.shape[1], from.shape[0]}, {}};
  for (Index j = 0; j < from.shape[1]; ++j)
    for (Index i = 0; i < from.shape[0]; ++i) out.values.push_back(from.values[static_cast<std::size_t>(i * from.shape[1] + j)]);
  return out;
}

/// The rows of q, k and v as one matrix, in the order that `blocks` blocks of [q | k | v] give.
std::vector<std::vector<float>> fuse(const std::vector<const Plain*>& parts, Index blocks) {
  std::vector<std::vector<float>> out;
  for (Index block = 0; block < blocks; ++block)
    for (const auto* part : parts)
      for (Index i = 0; i < part->shape[0] / blocks; ++i) out.push_back(part->row(block * part->shape[0] / blocks + i));
  return out;
}

void split(const std::vector<std::vector<float>>& rows, const std::vector<Plain*>& parts, Index blocks) {
  std::size_t next = 0;
  std::vector<std::vector<float>> values(parts.size());
  for (Index block = 0; block < blocks; ++block)
    for (std::size_t p = 0; p < parts.size(); ++p)
      for (Index i = 0; i < parts[p]->shape[0] / blocks; ++i, ++next) values[p].insert(values[p].end(), rows[next].begin(), rows[next].end());
  for (std::size_t p = 0; p < parts.size(); ++p) parts[p]->values = values[p];
}

const std::string kLayer = "layers.2.";

void refuse_fusion(Model& model, const std::vector<std::string>& names, Index written, Index read) {
  std::vector<const Plain*> from;
  std::vector<Plain*> to;
  const auto before = model;
  for (const auto& name : names) {
    from.push_back(&before.at(kLayer + name));
    to.push_back(&model.at(kLayer + name));
  }
  split(fuse(from, written), to, read);
}

bool has(const std::string& text, const char* part) { return text.find(part) != text.npos; }

}  // namespace

TEST_CASE("a difference that nothing explains has no hint") {
  const auto a = model(1);
  CHECK(hints(a, model(2)).empty());
  CHECK(hints(a, a).empty());
  auto b = a;
  b[kLayer + "mlp.down.weight"].values[17] += 1;
  CHECK(hints(a, b).empty());
}

TEST_CASE("QKV taken apart in the wrong order") {
  const auto a = model();
  const std::vector<std::string> names{"attention.q.weight", "attention.k.weight", "attention.v.weight"};
  auto flat = a;
  refuse_fusion(flat, names, 1, kGroups);
  const auto found = hints(a, flat);
  for (const auto& name : names) CHECK(found.at(kLayer + name).starts_with("QKV not interleaved: [all q | all k | all v] in b"));
  CHECK(found.size() == 3);
  CHECK(hints(flat, a).at(kLayer + names[0]).starts_with("QKV not interleaved"));
  auto reverse = a;
  refuse_fusion(reverse, names, kGroups, 1);
  CHECK(has(hints(a, reverse).at(kLayer + names[2]), "rows interleaved by query group taken as"));
  auto exchanged = a;
  std::swap(exchanged[kLayer + names[1]].values, exchanged[kLayer + names[2]].values);
  CHECK(hints(a, exchanged).at(kLayer + names[1]) == "k and v swapped");
}

TEST_CASE("gate and up") {
  const auto a = model();
  const std::vector<std::string> names{"mlp.gate.weight", "mlp.up.weight"};
  auto swapped = a;
  std::swap(swapped[kLayer + names[0]].values, swapped[kLayer + names[1]].values);
  const auto found = hints(a, swapped);
  CHECK(found.at(kLayer + names[0]) == "gate and up swapped");
  CHECK(found.at(kLayer + names[1]) == "gate and up swapped");
  auto ranks = a;
  refuse_fusion(ranks, names, 2, 1);
  CHECK(has(hints(a, ranks).at(kLayer + names[0]), "gate and up joined per tensor rank ([gate | up] of TP 2)"));
  auto alternating = a;
  refuse_fusion(alternating, names, kFfn, 1);
  CHECK(has(hints(a, alternating).at(kLayer + names[1]), "gate and up rows alternate in b"));
}

TEST_CASE("rotary pairs of every head, both ways") {
  const auto a = model();
  for (const char* which : {"attention.q.weight", "attention.k.weight"}) {
    auto b = a;
    const auto& from = a.at(kLayer + which);
    b[kLayer + which] = of_rows(from, from.shape[0], [&](Index row) {
      const auto at = row % kHead;
      return from.row(row - at + at % 2 * kHead / 2 + at / 2);  // b alternates: Meta's order
    });
    CHECK(has(hints(a, b).at(kLayer + which), "RoPE permutation: rotary pairs of every head alternate in b"));
    CHECK(has(hints(b, a).at(kLayer + which), "RoPE permutation: rotary pairs of every head are halves in b"));
    CHECK(hints(a, b).size() == 1);
  }
}

TEST_CASE("transposed, square and not") {
  auto a = model();
  std::mt19937 random(3);
  a[kLayer + "attention.out.weight"] = noise({kHidden, kHidden}, random);
  auto b = a;
  for (const char* which : {"attention.out.weight", "mlp.down.weight"}) b[kLayer + which] = transposed(a.at(kLayer + which));
  const auto found = hints(a, b);
  CHECK(found.at(kLayer + "attention.out.weight") == "transposed");
  CHECK(found.at(kLayer + "mlp.down.weight") == "transposed");
  CHECK(found.size() == 2);
}

TEST_CASE("layers in VPP order taken as global") {
  // PP 2, VPP 2 of 8 layers: the first stage holds 0 1 4 5.
  const Index order[] = {0, 1, 4, 5, 2, 3, 6, 7};
  const auto a = model();
  auto b = a;
  const auto moved = [&](const Model& from, Model& to, Index into, Index out) {
    for (const auto& [key, tensor] : from)
      if (const auto head = fmt::format("layers.{}.", out); key.starts_with(head)) to[fmt::format("layers.{}.", into) + key.substr(head.size())] = tensor;
  };
  for (Index l = 0; l < kLayers; ++l) moved(a, b, l, order[l]);
  const auto found = hints(a, b);
  CHECK(found.at("layers.2.attention.q.weight") == "layers in VPP order taken as global (b, PP 2 VPP 2): layer 2 of b is layer 4 of a");
  CHECK(found.at("layers.5.mlp.down.weight") == "layers in VPP order taken as global (b, PP 2 VPP 2): layer 5 of b is layer 3 of a");
  CHECK(found.size() == 4 * 8);  // of four layers every tensor
  auto exchanged = a;
  moved(a, exchanged, 3, 6);
  moved(a, exchanged, 6, 3);
  CHECK(hints(a, exchanged).at("layers.6.mlp.up.weight") == "layers permuted: layer 6 of b is layer 3 of a");
}

TEST_CASE("experts in another order") {
  const auto a = model();
  auto b = a;
  const auto key = [](Index e, const char* which) { return fmt::format("layers.0.mlp.experts.{}.{}.weight", e, which); };
  const auto from = [](Index e) { return e % 4 * 2 + e / 4; };  // EP 4: local 0 of every rank, then local 1
  for (Index e = 0; e < kExperts; ++e)
    for (const char* which : {"up", "down"}) b[key(e, which)] = a.at(key(from(e), which));
  CHECK(hints(a, b).at(key(1, "up")) == "experts ordered by local index before EP rank (b, EP 4): expert 1 of b is expert 2 of a");
  const auto& router = a.at("layers.0.mlp.router.weight");
  b["layers.0.mlp.router.weight"] = of_rows(router, kExperts, [&](Index e) { return router.row(from(e)); });
  CHECK(has(hints(a, b).at("layers.0.mlp.router.weight"), "its rows go with them"));
  auto ranks = a;
  for (Index e = 0; e < kExperts; ++e) ranks[key(e, "up")] = a.at(key((e + 4) % 8, "up"));
  CHECK(has(hints(a, ranks).at(key(0, "up")), "EP ranks exchanged (EP 2): expert 0 of b is expert 4 of a"));
}

TEST_CASE("vocabulary padding at the wrong end") {
  const auto a = model();
  auto b = a;
  const auto& from = a.at("embedding.word.weight");
  b["embedding.word.weight"] = of_rows(from, kPadded, [&](Index row) { return from.row((row + kVocab) % kPadded); });
  CHECK(hints(a, b).at("embedding.word.weight").starts_with("vocabulary padding at the wrong end: 8 rows at the start of b"));
  CHECK(hints(b, a).at("embedding.word.weight").starts_with("vocabulary padding at the wrong end: 8 rows at the start of a"));
  CHECK(hints(a, b, std::nullopt).at("embedding.word.weight").starts_with("vocabulary padding at the wrong end"));
  auto more = a;
  more["embedding.word.weight"] = of_rows(from, kVocab, [&](Index row) { return from.row(row); });
  CHECK(has(hints(a, more, std::nullopt).at("embedding.word.weight"), "vocabulary sizes differ: 48 rows against 40"));
}

TEST_CASE("norms that differ by one, in every type") {
  for (const auto dtype : {DType::F32, DType::BF16}) {
    auto a = model();
    auto& norm = a[kLayer + "attention.norm.weight"];
    norm.dtype = dtype;
    auto b = a;
    for (auto& value : b[kLayer + "attention.norm.weight"].values) value += 1;
    CHECK(hints(a, b).at(kLayer + "attention.norm.weight").starts_with("+1 norm: b is a + 1"));
    CHECK(hints(b, a).at(kLayer + "attention.norm.weight").starts_with("+1 norm: b is a - 1"));
  }
}

TEST_CASE("values: zeros, rounding, a factor, another type") {
  const auto a = model();
  const auto with = [&](const std::function<void(Plain&)>& change) {
    auto b = a;
    change(b[kLayer + "mlp.up.weight"]);
    return hints(a, b).at(kLayer + "mlp.up.weight");
  };
  CHECK(with([](Plain& t) { std::fill(t.values.begin(), t.values.end(), 0.0f); }) == "all zeros in b");
  CHECK(with([](Plain& t) { for (auto& value : t.values) value *= 0.5f; }) == "scaled by a constant: b is a × 0.5");
  CHECK(with([](Plain& t) { for (auto& value : t.values) value = -value; }) == "every sign is flipped");
  CHECK(has(with([](Plain& t) {
              for (auto& value : t.values) {
                std::byte narrow[2];
                cast(std::as_bytes(std::span(&value, 1)), DType::F32, narrow, DType::BF16);
                cast(narrow, DType::BF16, std::as_writable_bytes(std::span(&value, 1)), DType::F32);
              }
            }),
            "b holds a's values rounded to bf16"));
  CHECK(has(with([](Plain& t) { t.dtype = DType::BF16; }), "b holds a's values rounded to bf16"));
  CHECK(with([](Plain& t) { t.dtype = DType::F64; }) == "the same values as another type");
  auto large = model();
  for (auto& value : large[kLayer + "mlp.up.weight"].values) value = std::copysign(1e30f, value);
  for (const auto dtype : {DType::F16, DType::F8E4M3, DType::F8E5M2}) {
    auto b = large;
    b[kLayer + "mlp.up.weight"].dtype = dtype;
    CHECK(hints(large, b).at(kLayer + "mlp.up.weight").starts_with("b holds a's values rounded to " + std::string(name(dtype))));
  }
  CHECK(has(with([](Plain& t) { t.values[5] = std::nextafter(t.values[5], 1.0f); }), "rounding"));
}

TEST_CASE("tensor ranks in another order, repeated heads, rows in another order") {
  const auto a = model();
  auto b = a;
  const auto& down = a.at(kLayer + "mlp.down.weight");
  b[kLayer + "mlp.down.weight"] = of_rows(down, down.shape[0], [&](Index row) {
    auto values = down.row(row);
    std::rotate(values.begin(), values.begin() + kFfn / 2, values.end());
    return values;
  });
  const auto& up = a.at(kLayer + "mlp.up.weight");
  b[kLayer + "mlp.up.weight"] = of_rows(up, kFfn, [&](Index row) { return up.row((row + kFfn / 2) % kFfn); });
  const auto& k = a.at(kLayer + "attention.k.weight");
  b[kLayer + "attention.k.weight"] = of_rows(k, 2 * k.shape[0], [&](Index row) { return k.row(row / kHead / 2 * kHead + row % kHead); });
  const auto& gate = a.at(kLayer + "mlp.gate.weight");
  b[kLayer + "mlp.gate.weight"] = of_rows(gate, kFfn, [&](Index row) { return gate.row(row * 5 % kFfn); });
  const auto found = hints(a, b);
  CHECK(found.at(kLayer + "mlp.down.weight") == "blocks of columns in another order: tensor ranks exchanged (TP 2)");
  CHECK(found.at(kLayer + "mlp.up.weight") == "blocks of rows in another order: tensor ranks exchanged (TP 2)");
  CHECK(found.at(kLayer + "attention.k.weight") == "key and value heads repeated 2 times in b");
  CHECK(found.at(kLayer + "mlp.gate.weight") == "rows permuted: row 1 of b is row 5 of a");
}

TEST_CASE("a head that only one side holds") {
  const auto b = model();
  auto a = b;
  a["output.weight"] = a.at("embedding.word.weight");
  CHECK(hints(a, b).at("output.weight").starts_with("tied head missing in b"));
  a["output.weight"].values[0] += 1;
  CHECK(hints(b, a).at("output.weight").starts_with("head missing in a"));
}

