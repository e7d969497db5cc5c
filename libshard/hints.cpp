// Tries what is cheap and common first; the first mistake that explains all that was looked at is the hint.
#include "libshard/hints.h"

#include "libshard/hints/orders.h"
#include "libshard/hints/rows.h"
#include "libshard/hints/values.h"

#include <algorithm>

namespace shard {
namespace {

using namespace hints;

const char* const kHead = "output.weight";
const char* const kEmbedding = "embedding.word.weight";

class Explainer {
 public:
  Explainer(const Both& both, const Params& params, HashBytes hash) : both_(both), params_(params), hash_(hash) {}

  void look_at_layers(const std::set<std::string>& keys) { layers_ = layer_order(both_, keys, hash_); }

  std::string explain(const TensorDifference& one) {
    const auto *a = both_.a.find(one.key), *b = both_.b.find(one.key);
    if (!a || !b || volume(a->global_shape) == 0 || volume(b->global_shape) == 0) return {};
    // A vocabulary that is compared without its padding has its shape without it.
    const auto shape = [](const Side& side, const ShardedTensor& tensor) {
      auto out = tensor.natural.empty() ? tensor.global_shape : tensor.natural;
      if (!out.empty()) out[0] = side.rows(tensor);
      return out;
    };
    const Subject subject{one.key, *a, *b, static_cast<Index>(one.difference.first), shape(both_.a, *a) == shape(both_.b, *b)};
    return subject.same_shape ? same_shape(subject, one.difference) : other_shape(subject);
  }

 private:
  std::string same_shape(const Subject& subject, const Difference& difference) {
    const auto look = window(both_, subject.b, subject.first);
    if (auto text = explain_values(both_, subject, difference); !text.empty()) return text;
    if (auto text = explain_orders(subject, look); !text.empty()) return text;
    if (auto text = explain_fusion(both_, subject, look, params_); !text.empty()) return text;
    if (auto text = explain_rotary(both_, subject, look, params_); !text.empty()) return text;
    if (auto text = explain_transposed(both_, subject); !text.empty()) return text;
    if (auto text = explain_vocabulary(both_, subject); !text.empty()) return text;
    if (auto text = explain_ranks(both_, subject, look); !text.empty()) return text;
    return explain_row_order(both_, subject, look);
  }

  std::string other_shape(const Subject& subject) {
    if (auto text = explain_transposed(both_, subject); !text.empty()) return text;
    if (auto text = explain_vocabulary(both_, subject); !text.empty()) return text;
    return explain_repeated_heads(both_, subject, params_);
  }

  std::string explain_orders(const Subject& subject, const Window& look) {
    const auto moved = [&](const Numbered& key, const Order& order, const char* what) -> std::string {
      const auto from = order.from.find(key.number);
      if (key.number < 0 || from == order.from.end() || from->second == key.number) return {};
      const auto* tensor = both_.a.find(key.with(from->second));
      if (!tensor || !rows_match(both_, subject.b, look, [&](Index row) { return std::optional(RowOf{tensor, row}); })) return {};
      return fmt::format("{}: {} {} of b is {} {} of a", order.name, what, key.number, what, from->second);
    };
    if (auto text = moved(layer_of(subject.key), layers_, "layer"); !text.empty()) return text;
    const auto expert = expert_of(subject.key);
    if (expert.number < 0) return explain_router(subject, look);
    return moved(expert, experts(expert), "expert");
  }

  /// A router's rows go with the experts; where only they moved, the rows of the router say so.
  std::string explain_router(const Subject& subject, const Window& look) {
    constexpr std::string_view kRouter = "router.weight";
    if (!subject.key.ends_with(kRouter)) return {};
    const Numbered first{subject.key.substr(0, subject.key.size() - kRouter.size()) + "experts.", 0, "down.weight"};
    const auto& order = experts(first);
    if (order.from.empty() || !rows_match(both_, subject.b, look, [&](Index row) -> std::optional<RowOf> {
          const auto from = order.from.find(row);
          if (from == order.from.end()) return std::nullopt;
          return RowOf{&subject.a, from->second};
        }))
      return {};
    return fmt::format("{}: its rows go with them", order.name);
  }

  const Order& experts(const Numbered& key) {
    const auto found = experts_.find(key.head);
    return found != experts_.end() ? found->second : experts_.emplace(key.head, expert_order(both_, key, hash_)).first->second;
  }

  const Both& both_;
  const Params& params_;
  HashBytes hash_;
  Order layers_;
  std::map<std::string, Order> experts_;  ///< by what stands before the number
};

/// `with` holds a head of its own and the other side does not.
std::string explain_head(Side& with, Side& without, const char* with_name, const char* without_name) {
  const auto *head = with.find(kHead), *embedding = with.find(kEmbedding);
  if (!head || !embedding || without.find(kHead) || !without.find(kEmbedding)) return {};
  const auto [rows, width] = extent(*head);
  bool equal = extent(*embedding).width == width && head->dtype == embedding->dtype;
  const auto count = std::min(with.rows(*head), with.rows(*embedding));
  for (const auto row : spread(equal ? count : 0, 0, 64)) {
    const auto columns = std::min<Index>(width, 1024);
    const auto bytes = with.read(*head, row * width, columns);
    const std::vector<std::byte> kept(bytes.begin(), bytes.end());
    equal = equal && same_numbers(kept, head->dtype, with.read(*embedding, row * width, columns), head->dtype);
  }
  return equal ? fmt::format("tied head missing in {}: in {} it equals the embedding, which {} would use", without_name, with_name, without_name)
               : fmt::format("head missing in {}: the one in {} is not its embedding, so tying does not replace it", without_name, with_name);
}

}  // namespace

std::map<std::string, std::string> explain(const HintSide& a, const HintSide& b, const std::vector<TensorDifference>& different,
                                           const Params& params, HashBytes hash, const Kernels& kernels, const Budget& budget) {
  Side left(a.reader, a.vocab, kernels, budget), right(b.reader, b.vocab, kernels, budget);
  const Both both{left, right};
  std::map<std::string, std::string> out;
  Explainer explainer(both, params, hash);
  std::set<std::string> keys;
  for (const auto& one : different) keys.insert(one.key);
  explainer.look_at_layers(keys);
  for (const auto& one : different)
    if (auto text = explainer.explain(one); !text.empty()) out[one.key] = std::move(text);
  for (auto text : {explain_head(left, right, "a", "b"), explain_head(right, left, "b", "a")})
    if (!text.empty()) out[kHead] = std::move(text);
  return out;
}

}  // namespace shard
