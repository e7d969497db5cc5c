// Writing a graph as a pickle: a flat loop over what is still to be written; a node that is met twice is
// memoised. Refuses cycles that only an endless pickle could hold.
#include <algorithm>
#include <array>
#include <bit>
#include <limits>

#include "formats/pickle.h"
#include "libshard/error.h"

namespace formats::pickle {
namespace {

using shard::Code;

constexpr std::uint32_t kUnset = std::numeric_limits<std::uint32_t>::max();
constexpr std::size_t kBatch = 1000;     // items between a MARK and its APPENDS, as Python writes them
constexpr std::size_t kReentries = 100;  // of nodes that are being written already

class Writer {
 public:
  /// `memoise_all`: every container that is filled after it is made, shared or not.
  Writer(const Graph& graph, int protocol, bool memoise_all)
      : graph_(graph),
        new_(protocol >= 4),
        all_(memoise_all),
        uses_(graph.size()),
        memo_(graph.size(), kUnset),
        open_(graph.size()) {
    out_ += '\x80';
    out_ += static_cast<char>(protocol);
  }

  /// nullopt where a cycle can only be written with `memoise_all`.
  std::optional<std::string> run(Ref root) {
    count_uses(root);
    todo_.push_back({&Writer::visit, root});
    while (!todo_.empty()) {
      const Todo next = todo_.back();
      todo_.pop_back();
      (this->*next.step)(next.ref);
      if (reentries_ && !all_) return std::nullopt;
    }
    out_ += '.';
    return std::move(out_);
  }

 private:
  using Step = void (Writer::*)(Ref);
  struct Todo {
    Step step;
    Ref ref;  // or an opcode
  };

  // Which nodes are reached more than once.
  void count_uses(Ref root) {
    std::vector<Ref> open;
    const auto meet = [&](Ref ref) {
      if (uses_[ref] < 2 && ++uses_[ref] == 1) open.push_back(ref);
    };
    meet(root);
    while (!open.empty()) {
      const Ref ref = open.back();
      open.pop_back();
      ++kinds_[static_cast<std::size_t>(graph_.kind(ref))];
      if (graph_.kind(ref) < Kind::List || graph_.kind(ref) == Kind::Symbol) continue;
      for (const Ref item : graph_.items(ref)) meet(item);
      if (graph_.kind(ref) == Kind::Object) meet_parts(ref, meet);
    }
  }
  template <typename Meet>
  void meet_parts(Ref ref, const Meet& meet) const {
    meet(graph_.callable(ref));
    meet(graph_.args(ref));
    if (const auto kwargs = graph_.kwargs(ref)) meet(*kwargs);
    if (const auto state = graph_.state(ref)) meet(*state);
  }

  // Bytes.
  void op(unsigned code) { out_ += static_cast<char>(code); }
  void number(std::uint64_t value, int bytes) {
    for (int i = 0; i < bytes; ++i) out_ += static_cast<char>(value >> (8 * i));
  }
  void sized(unsigned short_op, unsigned op4, unsigned op8, std::string_view bytes) {
    if (short_op && bytes.size() < 256) {
      op(short_op), number(bytes.size(), 1);
    } else if (bytes.size() <= std::numeric_limits<std::uint32_t>::max()) {
      op(op4), number(bytes.size(), 4);
    } else {
      op(op8), number(bytes.size(), 8);
    }
    out_ += bytes;
  }
  void put_text(std::string_view text) { sized(new_ ? 0x8C : 0, 'X', 0x8D, text); }
  void put_integer(std::int64_t value) {
    if (value >= 0 && value < 256) return op('K'), number(static_cast<std::uint64_t>(value), 1);
    if (value >= 0 && value < 65536) return op('M'), number(static_cast<std::uint64_t>(value), 2);
    const auto bits = static_cast<std::uint64_t>(value);
    if (value == static_cast<std::int32_t>(value)) return op('J'), number(bits, 4);
    int bytes = 8;
    while (bytes > 1 && (value >> (8 * (bytes - 1) - 1)) == (value < 0 ? -1 : 0)) --bytes;
    op(0x8A), number(static_cast<std::uint64_t>(bytes), 1), number(bits, bytes);
  }
  void put_long(std::string_view bytes) {
    if (bytes.size() < 256) {
      op(0x8A), number(bytes.size(), 1);
    } else {
      op(0x8B), number(bytes.size(), 4);
    }
    out_ += bytes;
  }
  void put_float(double value) {
    const auto bits = std::bit_cast<std::uint64_t>(value);
    op('G');
    for (int i = 7; i >= 0; --i) out_ += static_cast<char>(bits >> (8 * i));
  }
  void put_name(std::string_view module, std::string_view name) {
    if (new_) {
      put_text(module), put_text(name), op(0x93);
      return;
    }
    // Readers of protocol 2 know the names of Python 2 and map them.
    out_ += 'c';
    out_ += module == "builtins" ? "__builtin__" : module;
    (out_ += '\n') += name;
    out_ += '\n';
  }

  // Memo.
  void memoise(std::uint32_t& slot) {
    slot = memoised_++;
    if (new_) return op(0x94);
    if (slot < 256) return op('q'), number(slot, 1);
    op('r'), number(slot, 4);
  }
  void recall(std::uint32_t slot) {
    if (slot < 256) return op('h'), number(slot, 1);
    op('j'), number(slot, 4);
  }
  bool shared(Ref ref) const {
    if (uses_[ref] > 1) return true;
    const Kind kind = graph_.kind(ref);
    return all_ && (kind == Kind::List || kind == Kind::Dict || kind == Kind::Set || kind == Kind::Object);
  }
  void memoise_if_shared(Ref ref) {
    if (shared(ref)) memoise(memo_[ref]);
  }
  /// For nodes that are made from their parts: a part that leads back has written the node meanwhile.
  void memoise_made(Ref ref) {
    if (memo_[ref] == kUnset) return memoise_if_shared(ref);
    op('0');
    recall(memo_[ref]);
  }

  // What is to be done later, in reverse order.
  void later(Step step, Ref ref) { todo_.push_back({step, ref}); }
  void later_op(unsigned code) { todo_.push_back({&Writer::op_step, code}); }
  void op_step(Ref code) { op(code); }
  void later_all(std::span<const Ref> items) {
    for (std::size_t i = items.size(); i-- > 0;) later(&Writer::visit, items[i]);
  }
  /// Items into a container that is on the stack, in batches.
  void later_batches(std::span<const Ref> items, std::size_t per_item, unsigned one, unsigned many) {
    const std::size_t batch = kBatch * per_item;
    for (std::size_t begin = (items.size() + batch - 1) / batch * batch; begin > 0;) {
      begin -= batch;
      const auto part = items.subspan(begin, std::min(batch, items.size() - begin));
      const bool single = one && part.size() == per_item;
      later_op(single ? one : many);
      later_all(part);
      if (!single) later_op('(');
    }
  }
  void later_appends(std::span<const Ref> items) { later_batches(items, 1, 'a', 'e'); }
  void later_entries(std::span<const Ref> entries) { later_batches(entries, 2, 's', 'u'); }

  void visit(Ref ref) {
    if (memo_[ref] != kUnset) return recall(memo_[ref]);
    switch (graph_.kind(ref)) {
      case Kind::None:
        return op('N');
      case Kind::Bool:
        return op(graph_.boolean(ref) ? 0x88 : 0x89);
      case Kind::Int:
        return put_integer(graph_.integer(ref));
      case Kind::BigInt:
        return put_long(graph_.text(ref));
      case Kind::Float:
        return put_float(graph_.real(ref));
      case Kind::Text:
        return put_text(graph_.text(ref)), memoise_if_shared(ref);
      case Kind::Bytes:
        return put_bytes(graph_.text(ref)), memoise_if_shared(ref);
      case Kind::Symbol:
        return put_name(graph_.module(ref), graph_.name(ref)), memoise_if_shared(ref);
      default:
        return visit_container(ref);
    }
  }
  void visit_container(Ref ref) {
    switch (graph_.kind(ref)) {
      case Kind::List:
        return op(']'), memoise_if_shared(ref), later_appends(graph_.items(ref));
      case Kind::Dict:
        return op('}'), memoise_if_shared(ref), later_entries(graph_.items(ref));
      case Kind::Set:
        return visit_set(ref);
      case Kind::Tuple:
        return graph_.items(ref).empty() ? op(')') : visit_made(ref);
      default:
        return visit_made(ref);
    }
  }
  void visit_set(Ref ref) {
    if (!new_) return visit_made(ref);
    op(0x8F);
    memoise_if_shared(ref);
    later_batches(graph_.items(ref), 1, 0, 0x90);
  }
  /// Nodes whose parts come first.
  void visit_made(Ref ref) {
    shard::require(!open_[ref] || ++reentries_ <= kReentries, Code::BadFormat,
                   [] { return "pickle: too many cycles through tuples and arguments to write"; });
    open_[ref] = uses_[ref] > 1;
    switch (graph_.kind(ref)) {
      case Kind::Tuple:
        return visit_tuple(ref);
      case Kind::Object:
        return visit_object(ref);
      case Kind::Persistent:
        return later(&Writer::finish_persistent, ref), later_all(graph_.items(ref));
      case Kind::FrozenSet:
        if (new_) return op('('), later(&Writer::finish_frozen, ref), later_all(graph_.items(ref));
        return visit_old_set(ref, "frozenset", frozenset_name_);
      default:
        return visit_old_set(ref, "set", set_name_);
    }
  }
  void visit_tuple(Ref ref) {
    const auto items = graph_.items(ref);
    if (items.size() > 3) op('(');
    later(&Writer::finish_tuple, ref);
    later_all(items);
  }
  void finish_tuple(Ref ref) {
    const std::size_t count = graph_.items(ref).size();
    op(count > 3 ? 't' : static_cast<unsigned>(0x84 + count));
    memoise_made(ref);
    finished(ref);
  }
  void finish_persistent(Ref ref) { op('Q'), memoise_made(ref), finished(ref); }
  void finish_frozen(Ref ref) { op(0x91), memoise_made(ref), finished(ref); }
  void finish_set(Ref ref) { op(0x85), op('R'), memoise_made(ref), finished(ref); }
  void finished(Ref ref) { open_[ref] = false; }

  void visit_object(Ref ref) {
    later(&Writer::finish_object, ref);
    if (const auto kwargs = graph_.kwargs(ref)) later(&Writer::visit, *kwargs);
    later(&Writer::visit, graph_.args(ref));
    later(&Writer::visit, graph_.callable(ref));
  }
  void finish_object(Ref ref) {
    op(graph_.kwargs(ref) ? 0x92 : graph_.is_new(ref) ? 0x81 : 'R');
    const bool written = memo_[ref] != kUnset;
    memoise_made(ref);
    finished(ref);
    if (written) return;
    if (const auto state = graph_.state(ref)) {
      later_op('b');
      later(&Writer::visit, *state);
    }
    graph_.dict_items(ref) ? later_entries(graph_.items(ref)) : later_appends(graph_.items(ref));
  }

  // Protocol 2 has no opcodes for sets and bytes: they are calls.
  bool several(Kind kind) const { return kinds_[static_cast<std::size_t>(kind)] > 1; }
  void put_known_name(std::string_view module, std::string_view name, std::uint32_t& slot, Kind kind) {
    if (slot != kUnset) return recall(slot);
    put_name(module, name);
    if (several(kind)) memoise(slot);
  }
  void visit_old_set(Ref ref, std::string_view name, std::uint32_t& slot) {
    put_known_name("builtins", name, slot, graph_.kind(ref));
    op(']');
    later(&Writer::finish_set, ref);
    later_appends(graph_.items(ref));
  }
  void put_bytes(std::string_view bytes) {
    if (new_) return sized('C', 'B', 0x8E, bytes);
    std::string text;
    for (const char c : bytes) {
      const auto value = static_cast<unsigned char>(c);
      if (value >= 0x80) text += static_cast<char>(0xC0 | value >> 6);
      text += static_cast<char>(value < 0x80 ? value : 0x80 | (value & 0x3F));
    }
    put_known_name("_codecs", "encode", encode_name_, Kind::Bytes);
    put_text(text);
    if (latin1_ != kUnset) {
      recall(latin1_);
    } else {
      put_text("latin1");
      if (several(Kind::Bytes)) memoise(latin1_);
    }
    op(0x86), op('R');
  }

  const Graph& graph_;
  const bool new_, all_;
  std::vector<std::uint8_t> uses_;
  std::vector<std::uint32_t> memo_;
  std::array<std::size_t, 16> kinds_{};  // how many nodes of each are reached
  std::uint32_t memoised_ = 0;
  std::uint32_t set_name_ = kUnset, frozenset_name_ = kUnset, encode_name_ = kUnset, latin1_ = kUnset;
  std::size_t reentries_ = 0;
  std::vector<bool> open_;
  std::vector<Todo> todo_;
  std::string out_;
};

}  // namespace

std::string write(const Graph& graph, Ref root, int protocol) {
  shard::require(protocol == 2 || protocol == 4, shard::Code::Usage,
                 [&] { return fmt::format("pickle protocol {}; 2 or 4", protocol); });
  auto written = Writer(graph, protocol, false).run(root);
  if (!written) written = Writer(graph, protocol, true).run(root);
  return std::move(*written);
}

}  // namespace formats::pickle
