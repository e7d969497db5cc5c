// Reading a pickle: one flat loop over its opcodes that fills a graph. Refuses names outside the table,
// opcodes that no checkpoint holds, and every length, memo number or stack that does not fit.
#include <algorithm>
#include <array>
#include <bit>
#include <charconv>
#include <limits>
#include <set>

#include "formats/pickle.h"
#include "formats/pickle_input.h"
#include "libshard/error.h"

namespace formats::pickle {
namespace {

constexpr Ref kUnset = std::numeric_limits<Ref>::max();
constexpr std::size_t kDigits = 400;  // of a decimal integer: converting takes their square

}  // namespace

class Reader : Input {
 public:
  Reader(std::span<const std::byte> bytes, const Limits& limits, std::vector<Name>* names)
      : Input(bytes), graph_(bytes.size()), limits_(limits), names_(names) {
    small_.fill(kUnset);
  }

  /// Returns how many bytes the pickle has.
  std::size_t run() {
    while (!stopped_) {
      if (graph_.size() >= limits_.nodes) [[unlikely]]
        refuse("more than {} values", limits_.nodes);
      step(opcode());
    }
    return used();
  }
  Graph release() { return std::move(graph_); }

 private:
  // Stack. Nothing below the last MARK may be taken.
  std::size_t floor() const { return marks_.empty() ? 0 : marks_.back(); }
  void push(Ref ref) { stack_.push_back(ref); }
  Ref& top() {
    if (stack_.size() <= floor()) [[unlikely]]
      refuse("takes a value from an empty stack");
    return stack_.back();
  }
  Ref pop() {
    const Ref ref = top();
    stack_.pop_back();
    return ref;
  }
  std::span<const Ref> marked() {
    if (marks_.empty()) refuse("needs a MARK, there is none");
    return std::span<const Ref>(stack_).subspan(marks_.back());
  }
  void drop_marked() {
    if (marks_.empty()) refuse("needs a MARK, there is none");
    stack_.resize(marks_.back());
    marks_.pop_back();
  }
  void push_instead_of_marked(Ref ref) {
    drop_marked();
    push(ref);
  }
  void pop_any() {
    if (stack_.size() > floor()) {
      stack_.pop_back();
    } else {
      drop_marked();
    }
  }

  // Memo.
  void put(std::uint64_t number) {
    // Picklers number from 0 and every number costs two bytes or more.
    if (number >= size()) refuse("memo number {} is out of bounds", number);
    if (number >= memo_.size()) memo_.resize(std::max<std::size_t>(number + 1, memo_.size() * 2), kUnset);
    Ref& slot = memo_[number];
    memoised_ += slot == kUnset;
    slot = top();
  }
  void get(std::uint64_t number) {
    if (number >= memo_.size() || memo_[number] == kUnset) refuse("memo number {} was never set", number);
    push(memo_[number]);
  }
  std::uint64_t memo_number(std::string_view digits) const {
    std::uint64_t value = 0;
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
    if (error != std::errc() || end != digits.data() + digits.size())
      refuse("a memo number that is no number");
    return value;
  }

  // Values.
  void push_integer(std::int64_t value) {
    if (value < 0 || value > 255) return push(graph_.integer(value));
    Ref& known = small_[static_cast<std::size_t>(value)];
    if (known == kUnset) known = graph_.integer(value);
    push(known);
  }
  void push_long(std::uint64_t bytes) {
    need(bytes);
    if (bytes > limits_.long_bytes) refuse("an integer of {} bytes; at most {}", bytes, limits_.long_bytes);
    push(graph_.big_integer(take(bytes)));
  }
  void push_decimal(std::string_view text) {
    const bool negative = text.starts_with('-');
    if (negative || text.starts_with('+')) text.remove_prefix(1);
    const bool digits =
        !text.empty() && std::all_of(text.begin(), text.end(), [](char c) { return c >= '0' && c <= '9'; });
    if (!digits || text.size() > kDigits)
      refuse("an integer that is none, or of more than {} digits", kDigits);
    push(graph_.big_integer(binary(text, negative)));
  }
  void push_decimal_or_bool(std::string_view text) {
    if (text == "00" || text == "01") return push(graph_.boolean(text == "01"));
    push_decimal(text);
  }
  void push_decimal_long(std::string_view text) {
    if (text.ends_with('L')) text.remove_suffix(1);
    push_decimal(text);
  }
  void push_float_text(std::string_view text) {
    double value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error == std::errc::invalid_argument || end != text.data() + text.size())
      refuse("a float that is none");
    push(graph_.real(value));
  }
  void push_float() {
    need(8);
    std::uint64_t bits = 0;
    for (const char c : take(8)) bits = bits << 8 | static_cast<unsigned char>(c);
    push(graph_.real(std::bit_cast<double>(bits)));
  }
  void push_text(std::uint64_t bytes) { push(graph_.text(checked_text(take(bytes)))); }
  void push_bytes(std::uint64_t bytes) { push(graph_.bytes(take(bytes))); }
  /// A Python 2 `str`, text or bytes.
  void push_string(std::uint64_t bytes) {
    const auto value = take(bytes);
    push(is_utf8(value) ? graph_.text(value) : graph_.bytes(value));
  }
  void push_bytearray(std::uint64_t bytes) {
    const Ref made = graph_.bytes(take(bytes));
    push(graph_.object(graph_.symbol("builtins", "bytearray"), graph_.tuple({made}), false));
  }
  void push_tuple(std::size_t count) {
    if (stack_.size() - floor() < count) refuse("takes a value from an empty stack");
    const auto last = std::span<const Ref>(stack_).last(count);
    const Ref made = graph_.tuple(last);
    stack_.resize(stack_.size() - count);
    push(made);
  }
  void push_marked_dict() {
    const auto entries = marked();
    if (entries.size() % 2) refuse("a key without a value");
    push_instead_of_marked(graph_.dict(entries));
  }

  // Filling containers.
  Ref filled(std::size_t below) {
    const std::size_t bottom = marks_.size() < 2 ? 0 : marks_[marks_.size() - 2];
    if (below <= bottom) refuse("takes a value from an empty stack");
    return stack_[below - 1];
  }
  void append_marked(bool to_set) {
    const auto items = marked();
    append(filled(marks_.back()), items, to_set);
    drop_marked();
  }
  void append(Ref to, std::span<const Ref> items, bool to_set) {
    const Kind kind = graph_.kind(to);
    const bool fits =
        to_set ? kind == Kind::Set : kind == Kind::List || (kind == Kind::Object && !graph_.dict_items(to));
    if (!fits) refuse("adds items to a {}", pickle::name(kind));
    graph_.append(to, items);
  }
  void append_one() {
    const Ref item = pop();
    append(top(), {&item, 1}, false);
  }
  void set_marked() {
    const auto entries = marked();
    set_entries(filled(marks_.back()), entries);
    drop_marked();
  }
  void set_entries(Ref to, std::span<const Ref> entries) {
    const Kind kind = graph_.kind(to);
    const bool object = kind == Kind::Object && (graph_.items(to).empty() || graph_.dict_items(to));
    if (kind != Kind::Dict && !object) refuse("sets items of a {}", pickle::name(kind));
    if (entries.size() % 2) refuse("a key without a value");
    graph_.append_entries(to, entries);
  }
  void set_one() {
    const Ref value = pop(), key = pop();
    const Ref entry[] = {key, value};
    set_entries(top(), entry);
  }

  // Names and objects.
  void note(std::string_view module, std::string_view name, Verdict found) {
    if (noted_.emplace(module, name).second) {
      names_->push_back({std::string(module), std::string(name), found});
    }
  }
  void push_symbol(std::string_view module, std::string_view name) {
    if (module == "__builtin__") module = "builtins";
    Verdict found = verdict(module, name);
    if (limits_.extra_state && module == "torch.storage" && name == "_load_from_bytes")
      found = Verdict::Record;
    if (names_) {
      note(module, name, found);
    } else if (found == Verdict::Refuse) {
      refuse("names {}.{}; only tensors, containers and known classes may be built", printable(module),
             printable(name));
    }
    if (module.size() > 32767 || name.size() > 32767) refuse("a name of more than 32767 bytes");
    push(graph_.add_symbol(module, name));
  }
  void push_global() {
    const auto module = checked_text(line());
    const auto name = checked_text(line());
    push_symbol(module, name);
  }
  void push_stack_global() {
    const Ref name = pop(), module = pop();
    if (graph_.kind(name) != Kind::Text || graph_.kind(module) != Kind::Text)
      refuse("a name that is no text");
    push_symbol(graph_.text(module), graph_.text(name));
  }
  void check_call(Ref callable, Ref args) const {
    if (graph_.kind(callable) != Kind::Symbol) refuse("calls a {}", pickle::name(graph_.kind(callable)));
    if (graph_.kind(args) != Kind::Tuple) refuse("calls with a {}", pickle::name(graph_.kind(args)));
  }
  void push_object(bool is_new) {
    const Ref args = pop(), callable = pop();
    check_call(callable, args);
    push(graph_.object(callable, args, is_new));
  }
  void push_object_ex() {
    const Ref kwargs = pop(), args = pop(), callable = pop();
    check_call(callable, args);
    if (graph_.kind(kwargs) != Kind::Dict) refuse("calls with a {}", pickle::name(graph_.kind(kwargs)));
    push(graph_.object_ex(callable, args, kwargs));
  }
  void build() {
    const Ref state = pop(), object = top();
    if (graph_.kind(object) != Kind::Object) refuse("gives state to a {}", pickle::name(graph_.kind(object)));
    if (graph_.state(object)) refuse("gives state to an object twice");
    graph_.set_state(object, state);
  }
  void push_persistent() {
    const Ref id = pop();
    const bool tuple = graph_.kind(id) == Kind::Tuple && graph_.items(id).size() == 4;
    // ('module', class, file, source) of the oldest files: the class is all that matters.
    const bool module = tuple && graph_.is_text(graph_.items(id)[0], "module");
    push(module && graph_.kind(graph_.items(id)[1]) == Kind::Symbol ? graph_.items(id)[1]
                                                                    : graph_.persistent(id));
  }
  /// Only a scan gets here: the old ways of naming a class are listed, then read on.
  void push_instance() {
    push_global();
    const Ref callable = pop();
    push_instead_of_marked(graph_.object(callable, graph_.tuple(marked()), false));
  }
  void push_marked_object() {
    const auto all = marked();
    if (all.empty()) refuse("takes a value from an empty stack");
    const Ref callable = all[0], args = graph_.tuple(all.subspan(1));
    check_call(callable, args);
    push_instead_of_marked(graph_.object(callable, args, false));
  }

  void protocol() {
    const unsigned version = byte();
    if (version > 5) refuse("protocol {}; 0 to 5 are known", version);
  }
  void frame() {
    const std::uint64_t bytes = number(8);
    need(bytes);
  }
  void stop() {
    graph_.root = pop();  // as in Python, what else is on the stack is dropped
    stopped_ = true;
  }
  [[noreturn]] void refuse_opcode(unsigned op) const {
    const bool shown = op > 0x20 && op < 0x7F;
    refuse("opcode 0x{:02x}{} is not allowed", op, shown ? fmt::format(" '{}'", static_cast<char>(op)) : "");
  }

  void step(unsigned op) {
    switch (op) {
      case 0x80:
        return protocol();
      case 0x95:
        return frame();
      case '.':
        return stop();
      case '(':
        return marks_.push_back(stack_.size());
      case '0':
        return pop_any();
      case '1':
        return drop_marked();
      case '2':
        return push(top());
      case 'N':
        return push(graph_.none());
      case 0x88:
        return push(graph_.boolean(true));
      case 0x89:
        return push(graph_.boolean(false));
      case 'K':
        return push_integer(byte());
      case 'M':
        return push_integer(static_cast<std::int64_t>(number(2)));
      case 'J':
        return push_integer(static_cast<std::int32_t>(number(4)));
      case 'I':
        return push_decimal_or_bool(line());
      case 'L':
        return push_decimal_long(line());
      case 0x8A:
        return push_long(byte());
      case 0x8B:
        return push_long(signed_length());
      case 'F':
        return push_float_text(line());
      case 'G':
        return push_float();
      case 0x8C:
        return push_text(byte());
      case 'X':
        return push_text(number(4));
      case 0x8D:
        return push_text(number(8));
      case 'U':
        return push_string(byte());
      case 'T':
        return push_string(signed_length());
      case 'C':
        return push_bytes(byte());
      case 'B':
        return push_bytes(number(4));
      case 0x8E:
        return push_bytes(number(8));
      case 0x96:
        return push_bytearray(number(8));
      default:
        return step_container(op);
    }
  }
  void step_container(unsigned op) {
    switch (op) {
      case ']':
        return push(graph_.list(std::span<const Ref>()));
      case '}':
        return push(graph_.dict(std::span<const Ref>()));
      case 0x8F:
        return push(graph_.set(std::span<const Ref>()));
      case ')':
        return push(graph_.empty_tuple());
      case 'l':
        return push_instead_of_marked(graph_.list(marked()));
      case 'd':
        return push_marked_dict();
      case 't':
        return push_instead_of_marked(graph_.tuple(marked()));
      case 0x91:
        return push_instead_of_marked(graph_.frozen_set(marked()));
      case 0x85:
        return push_tuple(1);
      case 0x86:
        return push_tuple(2);
      case 0x87:
        return push_tuple(3);
      case 'a':
        return append_one();
      case 'e':
        return append_marked(false);
      case 0x90:
        return append_marked(true);
      case 's':
        return set_one();
      case 'u':
        return set_marked();
      case 'p':
        return put(memo_number(line()));
      case 'q':
        return put(byte());
      case 'r':
        return put(number(4));
      case 0x94:
        return put(memoised_);
      case 'g':
        return get(memo_number(line()));
      case 'h':
        return get(byte());
      case 'j':
        return get(number(4));
      default:
        return step_object(op);
    }
  }
  void step_object(unsigned op) {
    switch (op) {
      case 'c':
        return push_global();
      case 0x93:
        return push_stack_global();
      case 'R':
        return push_object(false);
      case 0x81:
        return push_object(true);
      case 0x92:
        return push_object_ex();
      case 'b':
        return build();
      case 'Q':
        return push_persistent();
      case 'i':
        return names_ ? push_instance() : refuse_opcode(op);
      case 'o':
        return names_ ? push_marked_object() : refuse_opcode(op);
      default:
        refuse_opcode(op);
    }
  }
  std::uint64_t signed_length() {
    const auto length = static_cast<std::int32_t>(number(4));
    if (length < 0) refuse("a negative length");
    return static_cast<std::uint64_t>(length);
  }

  Graph graph_;
  const Limits& limits_;
  std::vector<Ref> stack_, memo_;
  std::vector<std::size_t> marks_;
  std::uint64_t memoised_ = 0;
  std::array<Ref, 256> small_;
  bool stopped_ = false;
  std::vector<Name>* names_;
  std::set<std::pair<std::string, std::string>> noted_;
};

Graph parse(std::span<const std::byte> pickle, const Limits& limits) {
  Reader reader(pickle, limits, nullptr);
  const std::size_t used = reader.run();
  shard::require(used == pickle.size(), shard::Code::BadFormat, [&] {
    return fmt::format("pickle byte {}: {} bytes after its end", used, pickle.size() - used);
  });
  return reader.release();
}

std::optional<Prefix> parse_prefix(std::span<const std::byte> bytes, const Limits& limits) {
  try {
    Reader reader(bytes, limits, nullptr);
    const std::size_t used = reader.run();
    return Prefix{reader.release(), used};
  } catch (const Truncated&) {
    return std::nullopt;
  }
}

std::vector<Name> scan(std::span<const std::byte> pickles) {
  constexpr std::size_t kMostPickles = 1 << 16, kOfTorch = 5;
  const Limits limits;  // the reader keeps a reference
  std::vector<Name> names;
  std::set<std::pair<std::string, std::string>> known;
  bool torch = false;
  std::size_t at = 0;
  for (std::size_t count = 0; count == 0 || at < pickles.size(); ++count) {
    if (torch && count == kOfTorch) break;
    shard::require(count < kMostPickles, shard::Code::BadFormat, [&] { return fmt::format("more than {} pickles in one file", kMostPickles); });
    std::vector<Name> more;
    Reader reader(pickles.subspan(at), limits, &more);
    try {
      at += reader.run();
    } catch (const shard::Error& error) {
      if (count == 0) throw;
      throw error.within(fmt::format("{} bytes behind pickle {} should be another one", pickles.size() - at, count));
    }
    const auto graph = reader.release();
    torch |= count == 0 && graph.kind(graph.root) == Kind::BigInt && graph.text(graph.root) == kTorchMagic;
    for (auto& one : more)
      if (known.emplace(one.module, one.name).second) names.push_back(std::move(one));
  }
  return names;
}

}  // namespace formats::pickle
