// Fingerprints are hashes over a few rows; an order is believed where they pair off one to one.
#include "libshard/hints/orders.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <optional>

namespace shard::hints {
namespace {

constexpr std::size_t kMostTails = 8;     // tensors of a layer that vote on what layer it is
constexpr Index kMostNumbers = 1 << 14;

std::string fingerprint(Side& side, const ShardedTensor& tensor, Index most, HashBytes hash) {
  const auto [rows, width] = extent(tensor);
  std::string text = fmt::format("{} {} ", name(tensor.dtype), to_string(tensor.natural));
  const auto columns = std::min<Index>(width, 256);
  for (const auto row : spread(rows, rows / 2, width == 1 ? 8 * most : most)) {
    const auto digest = hash(side.read(tensor, row * width, columns));
    text.append(reinterpret_cast<const char*>(digest.data()), sizeof digest);
  }
  return text;
}

/// b's numbers to a's, for tensors of one tail; empty where fingerprints do not tell a's apart.
std::map<Index, Index> pair_off(const Both& both, const Numbered& key, const std::set<Index>& numbers, Index most, HashBytes hash) {
  std::map<std::string, Index> in_a;
  std::map<Index, Index> out;
  for (const auto number : numbers)
    if (const auto* tensor = both.a.find(key.with(number)))
      if (!in_a.emplace(fingerprint(both.a, *tensor, most, hash), number).second) return {};
  for (const auto number : numbers)
    if (const auto* tensor = both.b.find(key.with(number)))
      if (const auto found = in_a.find(fingerprint(both.b, *tensor, most, hash)); found != in_a.end()) out[number] = found->second;
  return out;
}

bool identity(const std::map<Index, Index>& order) {
  return std::all_of(order.begin(), order.end(), [](const auto& pair) { return pair.first == pair.second; });
}

/// Whether the order is complete and at(i) gives it.
template <typename At>
bool is(const std::map<Index, Index>& order, Index count, At&& at) {
  if (static_cast<Index>(order.size()) != count) return false;
  for (Index i = 0; i < count; ++i) {
    const auto found = order.find(i);
    if (found == order.end() || found->second != at(i)) return false;
  }
  return true;
}

std::optional<Index> constant_shift(const std::map<Index, Index>& order) {
  if (order.empty()) return std::nullopt;
  const auto shift = order.begin()->second - order.begin()->first;
  for (const auto& [to, from] : order)
    if (from - to != shift) return std::nullopt;
  return shift;
}

std::string name_layers(const std::map<Index, Index>& order, Index layers) {
  for (Index pp = 2; pp <= layers; ++pp)
    for (Index vpp = 2; pp * vpp <= layers; ++vpp) {
      const auto sequence = vpp_sequence(layers, pp, vpp);
      if (sequence.empty()) continue;
      const auto at = [&](Index i) { return sequence[static_cast<std::size_t>(i)]; };
      if (is(order, layers, at)) return fmt::format("layers in VPP order taken as global (b, PP {} VPP {})", pp, vpp);
      std::vector<Index> inverse(sequence.size());
      for (std::size_t i = 0; i < sequence.size(); ++i) inverse[static_cast<std::size_t>(sequence[i])] = static_cast<Index>(i);
      if (is(order, layers, [&](Index i) { return inverse[static_cast<std::size_t>(i)]; }))
        return fmt::format("layers in VPP order taken as global (a, PP {} VPP {})", pp, vpp);
    }
  if (is(order, layers, [&](Index i) { return layers - 1 - i; })) return "layers reversed";
  if (const auto shift = constant_shift(order)) return fmt::format("layers numbered from another start (shifted by {})", *shift);
  return "layers permuted";
}

std::string name_experts(const std::map<Index, Index>& order, Index experts) {
  for (Index ep = 2; ep < experts; ++ep) {
    if (experts % ep != 0) continue;
    const auto local = experts / ep;
    if (is(order, experts, [&](Index e) { return e % ep * local + e / ep; }))
      return fmt::format("experts ordered by local index before EP rank (b, EP {})", ep);
  }
  for (Index ep = 2; ep < experts; ++ep) {
    const auto local = experts / ep;
    if (experts % ep != 0) continue;
    const auto rank_of = [&](Index e) {
      const auto found = order.find(e / local * local);
      return found == order.end() ? Index{-1} : found->second;
    };
    if (is(order, experts, [&](Index e) { return rank_of(e) + e % local; })) return fmt::format("EP ranks exchanged (EP {})", ep);
  }
  if (is(order, experts, [&](Index e) { return experts - 1 - e; })) return "experts reversed";
  if (const auto shift = constant_shift(order)) return fmt::format("experts numbered from another start (shifted by {})", *shift);
  return "experts permuted";
}

Numbered split_at(const std::string& key, std::size_t start) {
  Index number = 0;
  const auto* begin = key.data() + start;
  const auto* end = key.data() + key.size();
  const auto [at, error] = std::from_chars(begin, end, number);
  if (error != std::errc{} || number < 0 || at == begin || at == end || *at != '.') return {};
  return {key.substr(0, start), number, key.substr(static_cast<std::size_t>(at + 1 - key.data()))};
}

std::set<Index> numbers_of(const Both& both, const Numbered& key) {
  std::set<Index> out;
  for (const auto* side : {&both.a, &both.b}) {
    const auto& tensors = side->dict().tensors;
    for (auto it = tensors.lower_bound(key.head); it != tensors.end() && it->first.starts_with(key.head); ++it) {
      const auto one = split_at(it->first, key.head.size());
      if (one.number >= 0 && one.tail == key.tail && static_cast<Index>(out.size()) < kMostNumbers) out.insert(one.number);
    }
  }
  return out;
}

}  // namespace

Numbered layer_of(const std::string& key) { return key.starts_with("layers.") ? split_at(key, 7) : Numbered{}; }

Numbered expert_of(const std::string& key) {
  constexpr std::string_view kMark = ".experts.";
  const auto at = key.find(kMark);
  return at == key.npos ? Numbered{} : split_at(key, at + kMark.size());
}

std::vector<Index> vpp_sequence(Index layers, Index pp, Index vpp) {
  std::vector<Index> out;
  if (layers % (pp * vpp) != 0) return out;
  const auto per_chunk = layers / (pp * vpp);
  for (Index stage = 0; stage < pp; ++stage)
    for (Index chunk = 0; chunk < vpp; ++chunk)
      for (Index i = 0; i < per_chunk; ++i) out.push_back((chunk * pp + stage) * per_chunk + i);
  return out;
}

Order layer_order(const Both& both, const std::set<std::string>& keys, HashBytes hash) {
  std::map<std::string, std::set<Index>> tails;
  for (const auto& key : keys)
    if (const auto one = layer_of(key); one.number >= 0 && expert_of(key).number < 0) tails[one.tail].insert(one.number);
  std::map<Index, std::map<Index, int>> votes;
  std::map<Index, int> voters;  // by b's layer: dense layers and mixtures have different tensors
  std::set<Index> all;
  std::size_t used = 0;
  for (const auto& [tail, differing] : tails) {
    if (differing.size() < 2 || used == kMostTails) continue;
    const Numbered key{"layers.", 0, tail};
    const auto numbers = numbers_of(both, key);
    const auto pairs = pair_off(both, key, numbers, 8, hash);
    all.insert(numbers.begin(), numbers.end());
    if (pairs.empty()) continue;
    ++used;
    for (const auto number : numbers) voters[number] += both.b.find(key.with(number)) != nullptr;
    for (const auto& [to, from] : pairs) ++votes[to][from];
  }
  Order out;
  std::set<Index> taken;
  for (const auto& [to, from] : votes) {
    const auto best = std::max_element(from.begin(), from.end(), [](const auto& x, const auto& y) { return x.second < y.second; });
    if (2 * best->second > voters[to] && taken.insert(best->first).second) out.from[to] = best->first;
  }
  if (identity(out.from)) return {};
  out.name = name_layers(out.from, static_cast<Index>(all.size()));
  return out;
}

Order expert_order(const Both& both, const Numbered& key, HashBytes hash) {
  const auto numbers = numbers_of(both, key);
  Order out{pair_off(both, key, numbers, 4, hash), {}};
  if (identity(out.from)) return {};
  out.name = name_experts(out.from, static_cast<Index>(numbers.size()));
  return out;
}

}  // namespace shard::hints
