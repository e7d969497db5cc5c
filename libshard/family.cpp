// Matching stored keys against a table and splitting stored boxes into logical ones.
#include "libshard/family.h"

#include "libshard/error.h"

#include <algorithm>
#include <cctype>
#include <limits>

namespace shard {
namespace {

/// Recursive descent over + - * / and parentheses; expressions come from tables of a few words.
class Expression {
 public:
  Expression(std::string_view text, const Params& params) : text_(text), params_(params) {}
  Index value() {
    const auto out = sum(0);
    require(at_ == text_.size(), Code::BadFormat, [&] { return fmt::format("family: cannot read '{}'", text_); });
    return out;
  }

 private:
  static constexpr int kDeepest = 32;

  Index sum(int depth) {
    auto out = product(depth);
    for (;;) {
      if (eat('+')) __builtin_add_overflow(out, product(depth), &out);
      else if (eat('-')) __builtin_sub_overflow(out, product(depth), &out);
      else return out;
    }
  }
  Index product(int depth) {
    auto out = atom(depth);
    for (;;) {
      if (eat('*')) {
        require(!__builtin_mul_overflow(out, atom(depth), &out), Code::Mismatch,
                [&] { return fmt::format("family: '{}' overflows", text_); });
      } else if (eat('/')) {
        const auto by = atom(depth);
        require(by > 0 && out % by == 0, Code::Mismatch,
                [&] { return fmt::format("model: '{}' is {} / {}; should divide evenly", text_, out, by); });
        out /= by;
      } else {
        return out;
      }
    }
  }
  Index atom(int depth) {
    require(depth < kDeepest, Code::BadFormat, [&] { return fmt::format("family: '{}' is nested too deep", text_); });
    if (eat('(')) {
      const auto out = sum(depth + 1);
      require(eat(')'), Code::BadFormat, [&] { return fmt::format("family: ')' missing in '{}'", text_); });
      return out;
    }
    const auto start = at_;
    while (at_ < text_.size() && (std::isalnum(static_cast<unsigned char>(text_[at_])) || text_[at_] == '_')) ++at_;
    const auto word = text_.substr(start, at_ - start);
    require(!word.empty(), Code::BadFormat, [&] { return fmt::format("family: cannot read '{}'", text_); });
    if (std::isdigit(static_cast<unsigned char>(word.front()))) return std::stoll(std::string(word.substr(0, 15)));
    const auto found = params_.find(word);
    require(found != params_.end(), Code::Mismatch, [&] {
      return fmt::format("model: '{}' is not known from args or config{}", word, remedy(word));
    });
    return found->second;
  }
  /// Only some sizes have a flag.
  static std::string remedy(std::string_view word) {
    static const std::map<std::string, std::string, std::less<>> flags{
        {"heads", "num-attention-heads"}, {"groups", "num-query-groups"}, {"head", "kv-channels"},
        {"hidden", "hidden-size"},        {"ffn", "ffn-hidden-size"},     {"layers", "num-layers"},
        {"experts", "num-experts"},       {"vocab", "vocab-size"},        {"positions", "max-position-embeddings"},
        {"expert_ffn", "moe-ffn-hidden-size"}, {"gated", "swiglu"}};
    const auto found = flags.find(word);
    return found == flags.end() ? std::string() : "; give --" + found->second;
  }
  bool eat(char c) {
    while (at_ < text_.size() && text_[at_] == ' ') ++at_;
    if (at_ >= text_.size() || text_[at_] != c) return false;
    ++at_;
    return true;
  }

  std::string_view text_;
  const Params& params_;
  std::size_t at_ = 0;
};

std::vector<std::string_view> words(std::string_view text) {
  std::vector<std::string_view> out;
  std::size_t at = 0;
  while ((at = text.find_first_not_of(' ', at)) != text.npos) {
    const auto end = std::min(text.find(' ', at), text.size());
    out.push_back(text.substr(at, end - at));
    at = end;
  }
  return out;
}

struct Normal {
  std::string pattern;
  std::vector<Index> numbers;
};

bool all_digits(std::string_view text) {
  return !text.empty() && text.size() <= 9 &&
         std::all_of(text.begin(), text.end(), [](unsigned char c) { return std::isdigit(c) != 0; });
}

/// Numbers as whole components, or behind weight/bias in the last one, become "{}".
Normal normalise(std::string_view key) {
  Normal out;
  out.pattern.reserve(key.size());
  std::size_t at = 0;
  for (;;) {
    const auto end = std::min(key.find('.', at), key.size());
    const auto component = key.substr(at, end - at);
    const auto digits = component.find_last_not_of("0123456789") + 1;
    const auto stem = component.substr(0, digits);
    if (all_digits(component)) {
      out.pattern += "{}";
      out.numbers.push_back(std::stoll(std::string(component)));
    } else if (end == key.size() && (stem == "weight" || stem == "bias") && all_digits(component.substr(digits))) {
      out.pattern.append(stem).append("{}");
      out.numbers.push_back(std::stoll(std::string(component.substr(digits))));
    } else {
      out.pattern += component;
    }
    if (end == key.size()) return out;
    out.pattern += '.';
    at = end + 1;
  }
}

std::string anonymous(std::string pattern) {
  for (const auto* number : {"{l}", "{e}", "{k}", "{m}"})
    for (std::size_t at; (at = pattern.find(number)) != pattern.npos;) pattern.replace(at, 3, "{}");
  return pattern;
}

/// Equal spellings differ in shape by these alone; whether a layer is dense or has experts, its other keys say.
std::string deciding(std::string_view when) {
  std::string out;
  for (const auto word : words(when))
    if (word == "gated" || word == "!gated" || word == "mla" || word == "!mla") out.append(word).append(" ");
  return out;
}

/// The letters of "{l}", "{e}", "{k}" in the order they stand.
std::string number_order(std::string_view pattern) {
  std::string out;
  for (std::size_t at = 0; (at = pattern.find('{', at)) != pattern.npos; ++at)
    if (at + 2 < pattern.size() && pattern[at + 2] == '}') out += pattern[at + 1];
  return out;
}

/// Puts `parts` in the place of element `at`.
template <typename T>
void splice(std::vector<T>& list, std::size_t at, const std::vector<T>& parts) {
  const auto where = list.erase(list.begin() + static_cast<std::ptrdiff_t>(at));
  list.insert(where, parts.begin(), parts.end());
}

}  // namespace

Index evaluate(std::string_view expression, const Params& params) { return Expression(expression, params).value(); }

bool holds(std::string_view condition, const Params& params) {
  for (auto word : words(condition)) {
    const bool negated = word.front() == '!';
    if (negated) word.remove_prefix(1);
    const auto found = params.find(word);
    if ((found != params.end() && found->second != 0) == negated) return false;
  }
  return true;
}

bool fits_model(const Row& row, const Params& params) { return holds(deciding(row.when), params); }

Table::Table(std::vector<Row> rows, std::string_view dialects) {
  for (auto& row : rows)
    if (row.dialects.find_first_of(dialects) != std::string::npos) rows_.push_back(std::move(row));
  for (std::size_t i = 0; i < rows_.size(); ++i) {
    const auto& key = rows_[i].key;
    mtp_behind_layers_ |= key.find("{m}") != key.npos;
    for (const bool layers : {false, true})
      for (const bool experts : {false, true}) {
        if (layers && key.find("{l}.") == key.npos) continue;
        if (experts && key.find("{e}.") == key.npos) continue;
        auto pattern = key;
        if (layers) pattern = without(pattern, "{l}");
        if (experts) pattern = without(pattern, "{e}");
        spelled_.emplace(anonymous(pattern), Spelled{i, layers, experts, deciding(rows_[i].when)});
      }
  }
}

std::optional<Match> Table::fill(const Spelled& spelled, const std::vector<Index>& numbers, const Params& params) const {
  const auto& row = rows_[spelled.row];
  Match out{&row, -1, -1, -1, spelled.layers_stacked, spelled.experts_stacked};
  const auto known = params.find("layers");
  const auto layers = mtp_behind_layers_ && known != params.end() ? known->second : std::numeric_limits<Index>::max();
  std::size_t next = 0;
  for (const char letter : number_order(row.key)) {
    if ((letter == 'l' && out.layers_stacked) || (letter == 'e' && out.experts_stacked)) continue;
    const auto number = numbers[next++];
    if (letter == 'e') out.expert = number;
    else if (letter == 'k') out.depth = number;
    else out.layer = number;
    if (letter == 'm') out.depth = number - layers;
    if ((letter == 'm' && number < layers) || (letter == 'l' && number >= layers)) return std::nullopt;
  }
  return out;
}

std::optional<Match> Table::match(std::string_view key, const Params& params) const {
  const auto normal = normalise(key);
  const auto [begin, end] = spelled_.equal_range(normal.pattern);
  std::optional<Match> any;  // whatever args say, a key that is spelled has a place
  for (auto it = begin; it != end; ++it) {
    auto match = fill(it->second, normal.numbers, params);
    if (!match) continue;
    if (holds(it->second.when, params)) return match;
    any = match;
  }
  return any;
}

std::string spell(std::string_view pattern, Index layer, Index expert, Index depth) {
  std::string out(pattern);
  for (const auto& [number, value] :
       {std::pair<const char*, Index>{"{l}", layer}, {"{m}", layer}, {"{e}", expert}, {"{k}", depth}})
    for (std::size_t at; (at = out.find(number)) != out.npos;) out.replace(at, 3, std::to_string(value));
  return out;
}

std::string without(std::string pattern, std::string_view number) {
  const auto component = std::string(number) + ".";
  if (const auto at = pattern.find(component); at != pattern.npos) pattern.erase(at, component.size());
  return pattern;
}

Shape Factors::stored() const {
  Shape out;
  for (std::size_t f = 0; f < sizes.size(); ++f) {
    if (static_cast<std::size_t>(dim[f]) == out.size()) out.push_back(1);
    out.back() *= sizes[f];
  }
  return out;
}

Factors factors(const Row& row, const Params& params) {
  Factors out;
  int dim = 0;
  for (const auto word : words(row.dims)) {
    if (word == "|") {
      ++dim;
      continue;
    }
    out.sizes.push_back(evaluate(word, params));
    out.dim.push_back(dim);
    require(out.sizes.back() >= 0, Code::Mismatch,
            [&] { return fmt::format("{}: dimension '{}' is {}; should not be negative", row.key, word, out.sizes.back()); });
  }
  auto counted = out.sizes;  // beside a dimension of nothing, the others are multiplied, too
  std::replace(counted.begin(), counted.end(), Index{0}, Index{1});
  try {
    volume(counted);  // refuses products that overflow
  } catch (const Error& error) {
    throw error.within(row.key);
  }
  return out;
}

std::vector<LogicalPart> logical_parts(const Row& row, const Factors& factors, const Match& match,
                                       const Params& params) {
  std::vector<LogicalPart> out;
  for (const auto& part : row.parts) {
    LogicalPart logical{spell(part.name, match.layer, match.expert, match.depth), whole(factors.sizes), part.order, {}, {}, -1, {}};
    if (part.factor >= 0) {
      logical.box.lo[part.factor] = evaluate(part.lo, params);
      logical.box.size[part.factor] = evaluate(part.size, params);
    }
    auto sizes = logical.box.size;
    auto dim = factors.dim;
    if (!part.refine.empty()) {
      logical.refined = part.factor;
      for (const auto word : words(part.refine)) logical.into.push_back(evaluate(word, params));
      const auto f = static_cast<std::size_t>(part.factor);
      require(volume(logical.into) == sizes[f], Code::Mismatch,
              [&] { return fmt::format("family: {}: '{}' does not give the {} rows of its part", row.key, part.refine, sizes[f]); });
      splice(sizes, f, logical.into);
      splice(dim, f, std::vector<int>(logical.into.size(), factors.dim[f]));
    }
    if (logical.order.empty())
      for (std::size_t f = 0; f < sizes.size(); ++f) logical.order.push_back(static_cast<int>(f));
    int previous = -1;
    for (const int f : logical.order) {
      logical.shape.push_back(sizes[f]);
      if (dim[f] == previous) logical.natural.back() *= sizes[f];
      else logical.natural.push_back(sizes[f]);
      previous = dim[f];
    }
    out.push_back(std::move(logical));
  }
  return out;
}

namespace {

/// The factors of stored dimension `dim`.
std::pair<std::size_t, std::size_t> factors_of(const Factors& factors, int dim) {
  std::size_t begin = 0;
  while (begin < factors.dim.size() && factors.dim[begin] < dim) ++begin;
  std::size_t end = begin;
  while (end < factors.dim.size() && factors.dim[end] == dim) ++end;
  return {begin, end};
}

/// A stored box as boxes in factors: each stored dimension's range falls into few, their products make the boxes.
std::vector<Box> factored(const Factors& factors, const Box& stored) {
  std::vector<Box> out{Box{}};
  for (std::size_t d = 0; d < stored.lo.size(); ++d) {
    const auto [begin, end] = factors_of(factors, static_cast<int>(d));
    const Shape sizes(factors.sizes.begin() + begin, factors.sizes.begin() + end);
    std::vector<Box> next;
    for (const auto& range : flat_range(sizes, stored.lo[d], stored.lo[d] + stored.size[d]))
      for (auto box : out) {
        box.lo.insert(box.lo.end(), range.lo.begin(), range.lo.end());
        box.size.insert(box.size.end(), range.size.begin(), range.size.end());
        next.push_back(std::move(box));
      }
    out = std::move(next);
  }
  return out;
}

void add_box(const LogicalPart& part, const Box& box, const Shape& stride, Index offset, const Shard& stored, ShardedTensor& into) {
  Shard shard{{}, {stored.place.stream, stored.place.offset + static_cast<std::uint64_t>(offset), {}}, stored.replica_id};
  for (const int f : part.order) {
    shard.box.lo.push_back(box.lo[f]);
    shard.box.size.push_back(box.size[f]);
    shard.place.stride.push_back(stride[f]);
  }
  into.shards.push_back(std::move(shard));
}

}  // namespace

void add_logical(const LogicalPart& part, const Factors& factors, const Shard& stored, ShardedTensor& into) {
  Shape stride(factors.sizes.size());
  Index base = 0;
  for (std::size_t d = 0; d < stored.box.lo.size(); ++d) {
    const auto [begin, end] = factors_of(factors, static_cast<int>(d));
    Index step = stored.place.stride[d];
    for (auto f = end; f-- > begin;) {
      stride[f] = step;
      step *= factors.sizes[f];
    }
    base -= stored.box.lo[d] * stored.place.stride[d];
  }
  for (const auto& box : factored(factors, stored.box)) {
    const auto common = intersect(box, part.box);
    if (!common) continue;
    Index offset = base;
    for (std::size_t f = 0; f < stride.size(); ++f) offset += common->lo[f] * stride[f];
    Box local = *common;
    for (std::size_t f = 0; f < local.lo.size(); ++f) local.lo[f] -= part.box.lo[f];
    if (part.refined < 0) {
      add_box(part, local, stride, offset, stored, into);
      continue;
    }
    const auto f = static_cast<std::size_t>(part.refined);
    auto steps = row_major(part.into);
    for (auto& step : steps) step *= stride[f];
    auto fine = stride;
    splice(fine, f, steps);
    for (const auto& range : flat_range(part.into, local.lo[f], local.lo[f] + local.size[f])) {
      auto inner = local;
      splice(inner.lo, f, range.lo);
      splice(inner.size, f, range.size);
      Index at = offset - local.lo[f] * stride[f];
      for (std::size_t d = 0; d < steps.size(); ++d) at += range.lo[d] * steps[d];
      add_box(part, inner, fine, at, stored, into);
    }
  }
}

}  // namespace shard
