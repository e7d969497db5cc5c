// Dealing layers, vocabulary rows and fused dimensions out to ranks, as Megatron-Core does.
#include "libshard/layout.h"

#include "libshard/error.h"

#include <algorithm>
#include <array>
#include <numeric>
#include <set>

namespace shard {
namespace {

constexpr Index kMostStages = 1 << 16;  // a layout text can repeat: keep what it expands to small

std::string repeat_parentheses(std::string_view text) {
  std::string out;
  while (!text.empty()) {
    const auto open = text.find('(');
    out += text.substr(0, open);
    if (open == text.npos) break;
    const auto close = text.find(')', open);
    require(close != text.npos && text.substr(open + 1, close - open - 1).find('(') == text.npos, Code::BadLayout,
            [&] { return fmt::format("pipeline layout: parentheses do not match or are nested in '{}'", text); });
    const auto inner = text.substr(open + 1, close - open - 1);
    text.remove_prefix(close + 1);
    Index times = 1;
    if (!text.empty() && text.front() == '*') {
      std::size_t digits = 1;
      while (digits < text.size() && std::isdigit(static_cast<unsigned char>(text[digits]))) ++digits;
      require(digits > 1, Code::BadLayout, [] { return "pipeline layout: '*' needs a count"; });
      require(digits < 8, Code::BadLayout, [] { return "pipeline layout: expands to too many stages"; });
      times = std::stoll(std::string(text.substr(1, digits - 1)));
      text.remove_prefix(digits);
    }
    require(times * static_cast<Index>(inner.size()) + static_cast<Index>(out.size()) <= 4 * kMostStages, Code::BadLayout,
            [] { return "pipeline layout: expands to too many stages"; });
    for (Index i = 0; i < times; ++i) out += inner;
  }
  return out;
}

std::string repeat_letters(std::string_view text) {
  std::string out;
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '*') {
      out += text[i];
      continue;
    }
    std::size_t end = i + 1;
    while (end < text.size() && std::isdigit(static_cast<unsigned char>(text[end]))) ++end;
    require(!out.empty() && end > i + 1, Code::BadLayout,
            [] { return "pipeline layout: '*' needs a letter before it and a count behind it"; });
    require(end - i < 8, Code::BadLayout, [] { return "pipeline layout: expands to too many layers"; });
    const auto times = std::stoll(std::string(text.substr(i + 1, end - i - 1)));
    require(times <= kMostStages, Code::BadLayout, [] { return "pipeline layout: expands to too many layers"; });
    const char letter = out.back();
    out.pop_back();
    out.append(static_cast<std::size_t>(times), letter);
    i = end - 1;
  }
  return out;
}

std::vector<std::string> layout_stages(std::string_view text) {
  std::string bare;
  for (const char c : text)
    if (c != ',' && c != ' ') bare += c;
  const auto flat = repeat_letters(repeat_parentheses(bare));
  std::vector<std::string> stages(1);
  for (const char c : flat) {
    if (c == '|') {
      stages.emplace_back();
      continue;
    }
    require(c == 'E' || c == 't' || c == 'm' || c == 'L', Code::BadLayout,
            [&] { return fmt::format("pipeline layout: '{}' is no stage letter; E, t, m and L are", c); });
    stages.back() += c;
  }
  return stages;
}

Chunk chunk_of(std::size_t index, Index stages) {
  return {static_cast<Index>(index) % stages, static_cast<Index>(index) / stages};
}

Pipeline from_text(const Parallel& p, Index num_layers, Index mtp_layers) {
  const auto stages = layout_stages(p.pp_layout);
  require(stages.size() % p.pp == 0, Code::BadLayout, [&] {
    return fmt::format("pipeline layout '{}': {} stages; should be a multiple of pipeline size {}", p.pp_layout,
                       stages.size(), p.pp);
  });
  Pipeline out;
  out.stages = p.pp;
  out.chunks = static_cast<Index>(stages.size()) / p.pp;
  require(p.vpp == 1 || p.vpp == out.chunks, Code::BadLayout, [&] {
    return fmt::format("pipeline layout '{}': has {} chunks per stage, --vpp says {}", p.pp_layout, out.chunks, p.vpp);
  });
  out.mtp_layers = mtp_layers;
  Index next = 0, embeddings = 0, losses = 0, mtp = 0;
  for (std::size_t s = 0; s < stages.size(); ++s) {
    out.layers.emplace_back();
    for (const char c : stages[s]) {
      const auto here = chunk_of(s, p.pp);
      if (c == 't') {
        require(mtp == 0, Code::BadLayout, [&] { return fmt::format("pipeline layout '{}': 't' behind 'm'", p.pp_layout); });
        out.layers.back().push_back(next++);
        out.final_norm = here;
      } else if (c == 'E') {
        require(s == 0 && embeddings++ == 0 && next == 0, Code::BadLayout,
                [&] { return fmt::format("pipeline layout '{}': needs one E, at its start", p.pp_layout); });
        out.embedding = here;
      } else if (c == 'L') {
        ++losses;
        out.output = here;
      } else {
        require(mtp == 0 || out.mtp == here, Code::BadLayout,
                [&] { return fmt::format("pipeline layout '{}': all 'm' should be in one stage", p.pp_layout); });
        ++mtp;
        out.mtp = here;
      }
    }
  }
  require(embeddings == 1 && losses == 1, Code::BadLayout,
          [&] { return fmt::format("pipeline layout '{}': needs exactly one E and one L", p.pp_layout); });
  require(next == num_layers, Code::BadLayout, [&] {
    return fmt::format("pipeline layout '{}': places {} layers; the model has {}", p.pp_layout, next, num_layers);
  });
  require(mtp == mtp_layers, Code::BadLayout, [&] {
    return fmt::format("pipeline layout '{}': places {} MTP layers; the model has {}", p.pp_layout, mtp, mtp_layers);
  });
  if (mtp_layers == 0) out.mtp = out.output, out.final_norm = out.output;
  require(mtp_layers == 0 || out.mtp.chunk == out.chunks - 1, Code::BadLayout,
          [&] { return fmt::format("pipeline layout '{}': MTP layers should be in a last chunk", p.pp_layout); });
  return out;
}

Index divided(Index what, Index by, std::string_view whose) {
  require(by > 0 && what >= 0 && what % by == 0, Code::BadLayout,
          [&] { return fmt::format("pipeline: {} {} layers cannot be divided by {}", what, whose, by); });
  return what / by;
}

/// Layers per (stage, chunk); `by chunk * pp + stage`.
std::vector<Index> counts(const Parallel& p, Index num_layers) {
  std::vector<Index> out(static_cast<std::size_t>(p.pp * p.vpp));
  const auto first = p.first_stage_layers, last = p.last_stage_layers;
  if (first || last) {
    require(first.value_or(1) > 0 && last.value_or(1) > 0, Code::BadLayout, [&] {
      return fmt::format("pipeline: {} layers on the {} stage; should be above 0", first.value_or(1) > 0 ? *last : *first, first.value_or(1) > 0 ? "last" : "first");
    });
    require(!p.account_for_embedding && !p.account_for_loss, Code::BadLayout,
            [] { return "pipeline: first/last stage counts exclude counting embedding or loss as layers"; });
    const Index middle = p.pp - (first ? 1 : 0) - (last ? 1 : 0);
    const Index rest = num_layers - first.value_or(0) - last.value_or(0);
    require(rest >= 0 && middle >= 0 && (middle > 0 || rest == 0), Code::BadLayout, [&] {
      return fmt::format("pipeline: first {} and last {} stage layers do not fit {} layers on {} stages",
                         first.value_or(0), last.value_or(0), num_layers, p.pp);
    });
    const Index per_middle = middle ? divided(rest, middle, "middle") : 0;
    for (Index s = 0; s < p.pp; ++s) {
      const Index whole_stage = s == 0 && first ? *first : s == p.pp - 1 && last ? *last : per_middle;
      for (Index c = 0; c < p.vpp; ++c) out[c * p.pp + s] = divided(whole_stage, p.vpp, "stage's");
    }
    return out;
  }
  const Index counted = num_layers + (p.account_for_embedding ? 1 : 0) + (p.account_for_loss ? 1 : 0);
  std::fill(out.begin(), out.end(), divided(counted, p.pp * p.vpp, "counted"));
  if (p.account_for_embedding) --out.front();
  if (p.account_for_loss) --out.back();
  return out;
}

}  // namespace

Chunk Pipeline::of_layer(Index layer) const {
  for (std::size_t i = 0; i < layers.size(); ++i)
    if (!layers[i].empty() && layers[i].front() <= layer && layer <= layers[i].back()) return chunk_of(i, stages);
  fail(Code::BadLayout, "pipeline: layer {} is on no stage", layer);
}

Pipeline place_layers(const Parallel& p, Index num_layers, Index mtp_layers) {
  for (const auto size : {p.tp, p.pp, p.vpp, p.ep, p.etp}) {
    require(size >= 1, Code::BadLayout, [] { return "layout: parallel sizes should be at least 1"; });
    require(size <= kMostStages, Code::BadLayout, [&] { return fmt::format("layout: parallel size {}: more ranks than any cluster has", size); });
  }
  require(p.pp * p.vpp <= kMostStages && p.tp * p.ep <= kMostStages && ranks_per_stage(p) <= kMostStages, Code::BadLayout,
          [] { return "layout: more ranks than any cluster has"; });
  if (!p.pp_layout.empty()) return from_text(p, num_layers, mtp_layers);
  require(p.vpp == 1 || p.pp > 1, Code::BadLayout, [] { return "layout: --vpp needs --pp above 1"; });
  Pipeline out;
  out.stages = p.pp;
  out.chunks = p.vpp;
  out.mtp_layers = mtp_layers;
  Index next = 0;
  for (const auto count : counts(p, num_layers)) {
    require(count >= 0, Code::BadLayout, [] { return "pipeline: a stage would hold fewer than no layers"; });
    auto& layers = out.layers.emplace_back(static_cast<std::size_t>(count));
    std::iota(layers.begin(), layers.end(), next);
    next += count;
  }
  require(next == num_layers, Code::BadLayout, [&] {
    return fmt::format("pipeline: the stages hold {} layers together; the model has {}", next, num_layers);
  });
  out.output = out.mtp = {p.pp - 1, p.vpp - 1};
  out.final_norm = mtp_layers ? out.of_layer(num_layers - 1) : out.output;
  return out;
}

Index ranks_per_stage(const Parallel& p) { return std::lcm(p.tp, p.etp * p.ep); }

Cell cell_of(const Parallel& p, Index r) { return {r % p.tp, (r / p.etp) % p.ep, r % p.etp, r}; }

std::vector<Cell> cells(const Parallel& p) {
  std::vector<Cell> out;
  std::set<std::pair<Index, Index>> seen;
  std::set<std::array<Index, 3>> writers;
  for (Index r = 0; r < ranks_per_stage(p); ++r) {
    const auto cell = cell_of(p, r);
    if (seen.insert({cell.tensor, cell.expert}).second) out.push_back(cell);
    writers.insert({cell.tensor, cell.expert, cell.expert_tensor});
  }
  require(p.ep == 1 || writers.size() == out.size(), Code::BadLayout, [&] {
    return fmt::format("layout: expert tensor size {} above tensor size {}: two ranks would write one file", p.etp, p.tp);
  });
  return out;
}

Index padded_vocab(Index vocab, Index multiple, Index tp) {
  require(vocab >= 0 && multiple >= 1 && tp >= 1 && multiple <= (Index{1} << 32) && tp <= (Index{1} << 20), Code::BadLayout,
          [&] { return fmt::format("vocabulary of {}: make_vocab_size_divisible_by is {} and the tensor parallel size {}; should be from 1 to 2^32 and 2^20", vocab, multiple, tp); });
  const Index step = multiple * tp;
  return (vocab + step - 1) / step * step;
}

std::vector<Cut> cut(Index size, Index pieces, Index ways, Index rank) {
  require(size % (pieces * ways) == 0, Code::BadLayout,
          [&] { return fmt::format("layout: dimension {} in {} pieces cannot be divided by {}", size, pieces, ways); });
  std::vector<Cut> out;
  const Index part = size / pieces / ways;
  for (Index piece = 0; piece < pieces; ++piece) out.push_back({piece * (size / pieces) + rank * part, part});
  return out;
}

}  // namespace shard
