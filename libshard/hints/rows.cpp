// Every mistake is a map from b's rows to a's, tried on a few rows; the first of them is where the two differ, so that
// doing nothing never explains anything.
#include "libshard/hints/rows.h"

#include "libshard/fnv1a.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>

namespace shard::hints {
namespace {

Index param(const Params& params, std::string_view name) {
  const auto found = params.find(name);
  return found == params.end() ? 0 : found->second;
}

/// "….attention.k.weight" is {"….attention.", "k", ".weight"}.
struct Split {
  std::string head, part, tail;
};
Split split(const std::string& key) {
  const auto tail = key.rfind('.');
  const auto part = tail == key.npos || tail == 0 ? key.npos : key.rfind('.', tail - 1);
  if (part == key.npos) return {};
  return {key.substr(0, part + 1), key.substr(part + 1, tail - part - 1), key.substr(tail)};
}

/// A matrix that holds several parts: `blocks` blocks, in each of which every part has its share of rows.
struct Fused {
  std::vector<Index> sizes;
  Index total() const {
    Index sum = 0;
    for (const auto size : sizes) sum += size;
    return sum;
  }
  Index index(std::size_t part, Index row, Index blocks) const {
    const auto share = sizes[part] / blocks;
    auto out = row / share * (total() / blocks) + row % share;
    for (std::size_t p = 0; p < part; ++p) out += sizes[p] / blocks;
    return out;
  }
  std::pair<std::size_t, Index> locate(Index flat, Index blocks) const {
    const auto block = flat / (total() / blocks);
    auto rest = flat % (total() / blocks);
    std::size_t part = 0;
    while (rest >= sizes[part] / blocks) rest -= sizes[part++] / blocks;
    return {part, block * (sizes[part] / blocks) + rest};
  }
};

struct Family {
  std::vector<std::string> names;
  std::vector<const ShardedTensor*> a, b;
  Fused fused;
  std::size_t self = 0;
};

/// The tensors that are stored fused with the subject; no names where there are none.
Family family_of(const Both& both, const Split& key) {
  Family out;
  if (key.head.ends_with("attention.") && (key.part == "q" || key.part == "k" || key.part == "v")) out.names = {"q", "k", "v"};
  else if (key.part == "gate" || key.part == "up") out.names = {"gate", "up"};
  for (const auto& name : out.names) {
    const auto *a = both.a.find(key.head + name + key.tail), *b = both.b.find(key.head + name + key.tail);
    if (!a || !b || extent(*a).rows != extent(*b).rows || extent(*a).rows == 0) return {};
    if (name == key.part) out.self = out.a.size();
    out.a.push_back(a);
    out.b.push_back(b);
    out.fused.sizes.push_back(extent(*a).rows);
  }
  return out;
}

/// Whether `place(part, row)` of a explains every part of b; the subject's own first.
template <typename Place>
bool explains(const Both& both, const Family& family, const Window& look, Place&& place) {
  const auto holds_for = [&](std::size_t part, const Window& window) {
    return rows_match(both, *family.b[part], window, [&](Index row) {
      const auto [from, at] = place(part, row);
      return std::optional(RowOf{family.a[from], at});
    });
  };
  if (!holds_for(family.self, look)) return false;
  for (std::size_t part = 0; part < family.b.size(); ++part)
    if (part != family.self && !holds_for(part, window(both, *family.b[part], 0))) return false;
  return true;
}

std::string explain_exchange(const Both& both, const Family& family, const Window& look) {
  for (std::size_t other = 0; other < family.a.size(); ++other) {
    if (other == family.self) continue;
    const auto swapped = [&](std::size_t part) { return part == family.self ? other : part == other ? family.self : part; };
    if (family.fused.sizes[other] == family.fused.sizes[family.self] &&
        explains(both, family, look, [&](std::size_t part, Index row) { return std::pair(swapped(part), row); }))
      return fmt::format("{} and {} swapped", family.names[std::min(other, family.self)], family.names[std::max(other, family.self)]);
  }
  return {};
}

std::string qkv_text(Index blocks, bool forward, Index right) {
  if (blocks == 1)
    return forward ? "QKV not interleaved: [all q | all k | all v] in b taken as interleaved by query group"
                   : "QKV not interleaved: rows interleaved by query group taken as [all q | all k | all v] in b (or the reverse in a)";
  const auto what = fmt::format("QKV fused per tensor rank ([q | k | v] of TP {})", blocks);
  return what + (forward ? fmt::format(" taken as interleaved by {} query groups in b", right) : " expected where rows are interleaved by query group, in b");
}

std::string gate_text(Index blocks, bool forward, Index ffn) {
  if (blocks == ffn)
    return forward ? "gate and up rows alternate in b but were taken as [gate | up]" : "[gate | up] taken as alternating rows in b";
  return forward ? fmt::format("gate and up joined per tensor rank ([gate | up] of TP {}) but taken as one [gate | up] in b", blocks)
                 : fmt::format("[gate | up] taken as joined per tensor rank (TP {}) in b", blocks);
}

/// Heads of `step` rows, of which `size` from `lo` on are rotated.
struct Rotated {
  Index step, lo, size;
};

std::vector<Rotated> rotated(const Split& key, const ShardedTensor& tensor, const Params& params) {
  const auto rows = extent(tensor).rows, head = param(params, "head"), nope = param(params, "nope"), rope = param(params, "rope_dim"),
             lora = param(params, "kv_lora");
  if (!key.head.ends_with("attention.")) return {};
  if (key.part == "kv_down" && lora > 0 && rows == lora + rope) return {{rows, lora, rope}};
  if ((key.part == "q_up" || (key.part == "q" && rope > 0)) && nope + rope > 0) return {{nope + rope, nope, rope}};
  if ((key.part == "q_norm" || key.part == "k_norm") && rows == head) return {{rows, 0, rows}, {rows, 0, rows / 2}, {rows, 0, rows / 4}};
  if ((key.part == "q" || key.part == "k") && head > 0) return {{head, 0, head}, {head, 0, head / 2}, {head, 0, head / 4}};
  return {};
}

bool all_zero(std::span<const std::byte> bytes) {
  return std::all_of(bytes.begin(), bytes.end(), [](std::byte byte) { return byte == std::byte{}; });
}

constexpr Index kMostRows = 1 << 18;  // that are searched one by one
constexpr Index kPrefix = 32;         // elements that a row is known by

}  // namespace

std::string explain_fusion(const Both& both, const Subject& subject, const Window& look, const Params& params) {
  const auto key = split(subject.key);
  const auto family = family_of(both, key);
  if (family.names.empty()) return {};
  if (auto text = explain_exchange(both, family, look); !text.empty()) return text;
  const bool qkv = family.names.size() == 3;
  const auto& fused = family.fused;
  const auto least = *std::min_element(fused.sizes.begin(), fused.sizes.end());
  const auto right = qkv ? param(params, "groups") : Index{1};
  const auto divides = [&](Index blocks) {
    return blocks > 0 && std::all_of(fused.sizes.begin(), fused.sizes.end(), [&](Index size) { return size % blocks == 0; });
  };
  if (!divides(right)) return {};
  std::vector<Index> others{1};
  for (Index blocks = 2; blocks <= std::min<Index>(least, qkv ? right : 64); blocks *= 2) others.push_back(blocks);
  if (!qkv) others.push_back(least);
  for (const auto blocks : others) {
    if (blocks == right || !divides(blocks)) continue;
    for (const bool forward : {true, false}) {
      const auto written = forward ? blocks : right, read = forward ? right : blocks;
      if (explains(both, family, look, [&](std::size_t part, Index row) { return fused.locate(fused.index(part, row, read), written); }))
        return qkv ? qkv_text(blocks, forward, right) : gate_text(blocks, forward, least);
    }
  }
  // Megatron's checkpoint version 1 has [heads, head, 3] where later ones have [heads, 3, head].
  const auto head = param(params, "head");
  if (qkv && head > 0 && fused.sizes[0] == fused.sizes[1] && fused.sizes[1] == fused.sizes[2] && fused.sizes[0] % head == 0)
    for (const bool forward : {true, false})
      if (explains(both, family, look, [&](std::size_t part, Index row) {
            const auto of_head = static_cast<Index>(part) * head + row % head;  // in b, within 3 × head rows
            const auto base = row / head * head;
            return forward ? std::pair(static_cast<std::size_t>(of_head % 3), base + of_head / 3)
                           : std::pair(static_cast<std::size_t>((row % head * 3 + static_cast<Index>(part)) / head), base + (row % head * 3 + static_cast<Index>(part)) % head);
          }))
        return "QKV in the row order of an old checkpoint version ([heads, head, 3]) in one of the two";
  return {};
}

std::string explain_rotary(const Both& both, const Subject& subject, const Window& look, const Params& params) {
  for (const auto& [step, lo, size] : rotated(split(subject.key), subject.b, params)) {
    if (size < 4 || size % 2 != 0 || extent(subject.b).rows % step != 0) continue;
    for (const bool alternating : {true, false})
      if (rows_match(both, subject.b, look, [&, step = step, lo = lo, size = size](Index row) {
            const auto at = row % step - lo, half = size / 2;
            if (at < 0 || at >= size) return std::optional(RowOf{&subject.a, row});
            const auto from = alternating ? at % 2 * half + at / 2 : at < half ? 2 * at : 2 * (at - half) + 1;
            return std::optional(RowOf{&subject.a, row - at + from});
          }))
        return fmt::format("RoPE permutation: rotary pairs of every head {}",
                           alternating ? "alternate in b (Meta's order) and are halves in a (Hugging Face's)" : "are halves in b (Hugging Face's order) and alternate in a (Meta's)");
  }
  return {};
}

std::string explain_transposed(const Both& both, const Subject& subject) {
  const auto [rows, width] = extent(subject.b);
  const auto [rows_a, width_a] = extent(subject.a);
  if (rows < 2 || width < 2 || rows != width_a || width != rows_a) return {};
  const auto columns = std::min<Index>(width, 48), column = std::clamp<Index>(subject.first % width - columns / 2, 0, width - columns);
  for (const auto row : spread(rows, subject.first / width, 8)) {
    const auto right = both.b.read(subject.b, row * width + column, columns);
    const auto item = size_of(subject.b.dtype);
    for (Index c = 0; c < columns; ++c)
      if (!same_numbers(both.a.read(subject.a, (column + c) * width_a + row, 1), subject.a.dtype, right.subspan(static_cast<std::size_t>(c) * item, item), subject.b.dtype))
        return {};
  }
  return "transposed";
}

std::string explain_vocabulary(const Both& both, const Subject& subject) {
  if ((!subject.b.vocabulary && !subject.a.vocabulary) || !both.may_search()) return {};
  const auto [rows_b, width] = extent(subject.b);
  const auto [rows_a, width_a] = extent(subject.a);
  if (width != width_a || width == 0 || std::max(rows_a, rows_b) > kMostRows * 4) return {};
  const auto count = both.a.rows(subject.a);
  const auto prefix = std::min(width, kPrefix);
  std::vector<std::byte> wanted;
  Index known = -1;
  for (const auto row : {std::min(subject.first / width, count - 1), count / 2, Index{0}}) {
    const auto bytes = both.a.read(subject.a, row * width, prefix);
    if (all_zero(bytes)) continue;
    wanted.assign(bytes.begin(), bytes.end());
    known = row;
    break;
  }
  if (known < 0) return {};
  int tries = 0;
  for (Index row = 0; row < rows_b && tries < 16; ++row) {
    if (!same_numbers(wanted, subject.a.dtype, both.b.read(subject.b, row * width, prefix), subject.b.dtype)) continue;
    ++tries;
    const auto shift = row - known;
    Window look;
    look.columns = std::min<Index>(width, 256);
    const auto common = std::min(count, shift < 0 ? rows_b : rows_b - shift);
    for (const auto at : spread(common - std::max<Index>(0, -shift), 0, both.rows_to_look_at())) look.rows.push_back(at + std::max<Index>(shift, 0));
    if (!rows_match(both, subject.b, look, [&](Index at) { return std::optional(RowOf{&subject.a, at - shift}); })) continue;
    if (shift != 0)
      return fmt::format("vocabulary padding at the wrong end: {} rows at the start of {} where padding belongs at the end", std::abs(shift), shift > 0 ? "b" : "a");
    if (!subject.same_shape) return fmt::format("vocabulary sizes differ: {} rows against {}; the rows that both have are equal", both.a.rows(subject.a), both.b.rows(subject.b));
  }
  return {};
}

std::string explain_repeated_heads(const Both& both, const Subject& subject, const Params& params) {
  const auto key = split(subject.key);
  const auto head = param(params, "head");
  const auto a = extent(subject.a), b = extent(subject.b);
  if ((key.part != "k" && key.part != "v") || head <= 0 || a.width != b.width || a.rows == b.rows || a.rows == 0 || b.rows == 0) return {};
  const bool in_b = b.rows > a.rows;
  const auto more = std::max(a.rows, b.rows), less = std::min(a.rows, b.rows);
  if (more % less != 0 || less % head != 0) return {};
  const auto times = more / less;
  if (!rows_match(both, subject.b, window(both, subject.b, 0), [&](Index row) {
        const auto from = in_b ? row / head / times : row / head * times;
        return std::optional(RowOf{&subject.a, from * head + row % head});
      }))
    return {};
  return fmt::format("key and value heads repeated {} times in {}", times, in_b ? "b" : "a");
}

std::string explain_ranks(const Both& both, const Subject& subject, const Window& look) {
  const auto [rows, width] = extent(subject.b);
  if (!subject.same_shape) return {};
  const auto same_at = [&](Index a_flat, Index b_flat, Index count) {
    const auto right = both.b.read(subject.b, b_flat, count);
    return same_numbers(both.a.read(subject.a, a_flat, count), subject.a.dtype, right, subject.b.dtype);
  };
  for (Index ways = 2; ways <= 16; ways *= 2) {
    if (rows % ways == 0 && rows / ways > 1 && width > 1) {
      const auto share = rows / ways;
      std::vector<Index> from(static_cast<std::size_t>(ways), -1);
      bool found = true;
      for (Index block = 0; block < ways && found; ++block) {
        for (Index other = 0; other < ways && from[static_cast<std::size_t>(block)] < 0; ++other)
          if (same_at(other * share * width, block * share * width, std::min<Index>(width, 256))) from[static_cast<std::size_t>(block)] = other;
        found = from[static_cast<std::size_t>(block)] >= 0;
      }
      if (found && rows_match(both, subject.b, look, [&](Index row) { return std::optional(RowOf{&subject.a, from[static_cast<std::size_t>(row / share)] * share + row % share}); }))
        return fmt::format("blocks of rows in another order: tensor ranks exchanged (TP {})", ways);
    }
    if (width % ways == 0 && width / ways > 1) {
      const auto share = width / ways, count = std::min<Index>(share, 256);
      std::vector<Index> from(static_cast<std::size_t>(ways), -1);
      const auto first_row = subject.first / width;
      for (Index block = 0; block < ways; ++block)
        for (Index other = 0; other < ways && from[static_cast<std::size_t>(block)] < 0; ++other)
          if (same_at(first_row * width + other * share, first_row * width + block * share, count)) from[static_cast<std::size_t>(block)] = other;
      const auto block_of_first = subject.first % width / share;
      if (std::find(from.begin(), from.end(), -1) != from.end() || from[static_cast<std::size_t>(block_of_first)] == block_of_first) continue;
      if (std::all_of(look.rows.begin(), look.rows.end(), [&, width = width](Index row) {
            for (Index block = 0; block < ways; ++block)
              if (!same_at(row * width + from[static_cast<std::size_t>(block)] * share, row * width + block * share, count)) return false;
            return true;
          }))
        return fmt::format("blocks of columns in another order: tensor ranks exchanged (TP {})", ways);
    }
  }
  return {};
}

std::string explain_row_order(const Both& both, const Subject& subject, const Window& look) {
  const auto [rows, width] = extent(subject.a);
  if (width < 8 || rows < 2 || rows > kMostRows || !both.may_search() || width != extent(subject.b).width || look.rows.empty()) return {};
  const auto prefix = std::min(look.columns, kPrefix);
  if (subject.a.dtype != subject.b.dtype) return {};
  // Most differences are no permutation: the row where they begin must be somewhere before all rows are indexed.
  const auto right = both.b.read(subject.b, look.rows.front() * width + look.column, prefix);
  const auto wanted = fnv1a(right);
  std::unordered_map<std::uint64_t, Index> at;
  at.reserve(static_cast<std::size_t>(rows));
  for (Index row = 0; row < rows; ++row) {
    const auto [entry, fresh] = at.emplace(fnv1a(both.a.read(subject.a, row * width + look.column, prefix)), row);
    if (!fresh) entry->second = -1;  // not told apart
  }
  const auto from_of = [&, width = width](Index row) -> std::optional<RowOf> {
    const auto found = at.find(fnv1a(both.b.read(subject.b, row * width + look.column, prefix)));
    if (found == at.end() || found->second < 0) return std::nullopt;
    return RowOf{&subject.a, found->second};
  };
  if (!at.contains(wanted) || !rows_match(both, subject.b, look, from_of)) return {};
  return fmt::format("rows permuted: row {} of b is row {} of a", look.rows.front(), from_of(look.rows.front())->row);
}

}  // namespace shard::hints
