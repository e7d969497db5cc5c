// Pickles as data: reads one into a graph of values and records, and writes such a graph. Never runs or
// imports anything; refuses a pickle that names what no checkpoint needs.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace formats::pickle {

/// A node of a Graph.
using Ref = std::uint32_t;

enum class Kind : std::uint8_t {
  None,
  Bool,
  Int,
  BigInt,  ///< an integer beyond 64 bits; text() is its little-endian two's complement
  Float,
  Text,
  Bytes,
  List,
  Tuple,
  Dict,
  Set,
  FrozenSet,
  Symbol,      ///< module.name
  Object,      ///< what calling a symbol would give: callable, arguments, items, state
  Persistent,  ///< a persistent id
};
std::string_view name(Kind kind);

enum class Verdict {
  Build,   ///< known: a value that readers interpret
  Record,  ///< kept and written back, not interpreted
  Refuse,  ///< the whole pickle is refused
};
/// What naming `module.name` in a pickle means. A name with a dot is always refused.
Verdict verdict(std::string_view module, std::string_view name);

struct Limits {
  std::size_t nodes = std::size_t{1} << 31;
  std::size_t long_bytes = std::size_t{1} << 16;  ///< of one integer
  bool extra_state = false;  ///< a pickle inside `_extra_state`: torch.storage._load_from_bytes is a record
};

/// Bytes that stay where they are until the end. Owns its blocks.
class Arena {
 public:
  /// Sets the size of the first block; later ones grow up to 1 MiB.
  explicit Arena(std::size_t first = 512) : next_(first) {}
  void* take(std::size_t bytes, std::size_t alignment) {
    const std::size_t pad = (alignment - reinterpret_cast<std::uintptr_t>(at_)) & (alignment - 1);
    if (bytes + pad > left_) [[unlikely]]
      return take_from_new_block(bytes);
    char* const start = at_ + pad;
    at_ = start + bytes;
    left_ -= bytes + pad;
    return start;
  }

 private:
  void* take_from_new_block(std::size_t bytes);
  std::vector<std::unique_ptr<char[]>> blocks_;
  char* at_ = nullptr;
  std::size_t left_ = 0, next_;
};

/// Nodes that name each other by number, so that sharing and cycles are plain and nothing recurses. Views
/// that it returns stay valid for its life; a span of items does not follow later changes of its node. Moves,
/// does not copy.
class Graph {
 public:
  explicit Graph(std::size_t expected_bytes = 256);
  Graph(Graph&&) = default;
  Graph& operator=(Graph&&) = default;

  Ref root = 0;
  /// All nodes are [0, size()).
  std::size_t size() const { return nodes_.size(); }

  Kind kind(Ref ref) const { return node(ref).kind; }
  bool boolean(Ref ref) const;  ///< of a Bool; like the next ones BadFormat where the node is another kind
  std::int64_t integer(Ref ref) const;   ///< of an Int or Bool
  double real(Ref ref) const;            ///< of a Float, Int or Bool
  std::string_view text(Ref ref) const;  ///< of Text, Bytes or BigInt
  /// Of List, Tuple, Set, FrozenSet; Dict: key, value, key, value …; Persistent: its id; Object: its items.
  std::span<const Ref> items(Ref ref) const;
  std::string_view module(Ref symbol) const;
  std::string_view name(Ref symbol) const;
  Ref callable(Ref object) const;
  Ref args(Ref object) const;                   ///< a Tuple
  std::optional<Ref> kwargs(Ref object) const;  ///< a Dict, of NEWOBJ_EX
  bool is_new(Ref object) const;                ///< made by NEWOBJ or NEWOBJ_EX, not by REDUCE
  bool dict_items(Ref object) const;            ///< the object's items are key, value, …
  std::optional<Ref> state(Ref object) const;   ///< what BUILD gave it

  bool is_none(Ref ref) const { return kind(ref) == Kind::None; }
  bool is_text(Ref ref, std::string_view text) const;
  bool is_symbol(Ref ref, std::string_view module, std::string_view name) const;
  /// An Object whose callable is that symbol.
  bool is_object(Ref ref, std::string_view module, std::string_view name) const;
  /// The value of a text key in a Dict or an Object with dict items; of several the last one, as in Python.
  std::optional<Ref> find(Ref dict, std::string_view key) const;
  /// The value of an attribute in a state that is a dict or a pair (dict or None, dict of slots).
  std::optional<Ref> attribute(Ref object, std::string_view key) const;
  /// The bytes that a Bytes node, `_codecs.encode(text, 'latin1')`, `bytes(…)` or `bytearray(…)` stands for.
  std::optional<std::string> bytes_value(Ref ref) const;

  /// By node: whether it is `wanted` or leads to one that is. One walk for all nodes, which may share what they lead to.
  std::vector<bool> leading_to(const std::function<bool(Ref)>& wanted) const;

  Ref none() const { return 0; }
  // Templates, so that a Ref never passes for a value: std::uint32_t always means a node.
  template <std::same_as<bool> Value>
  Ref boolean(Value value) const {
    return value ? 2 : 1;
  }
  Ref empty_tuple() const { return 3; }
  template <std::integral Value>
  requires(!std::same_as<Value, Ref> && !std::same_as<Value, bool>) Ref integer(Value value) {
    return add_integer(static_cast<std::int64_t>(value));
  }
  template <std::floating_point Value>
  Ref real(Value value) {
    return add_real(value);
  }
  Ref text(std::string_view value);
  Ref word(std::string_view value);  ///< a text that several nodes share: the same Ref for the same text
  Ref bytes(std::string_view value);
  Ref big_integer(std::string_view twos_complement);  ///< an Int where it fits
  Ref list(std::span<const Ref> items);
  Ref tuple(std::span<const Ref> items);
  Ref dict(std::span<const Ref> keys_and_values);
  Ref set(std::span<const Ref> items);
  Ref frozen_set(std::span<const Ref> items);
  Ref list(std::initializer_list<Ref> items) { return list(std::span(items.begin(), items.size())); }
  Ref tuple(std::initializer_list<Ref> items) { return tuple(std::span(items.begin(), items.size())); }
  Ref dict(std::initializer_list<Ref> items) { return dict(std::span(items.begin(), items.size())); }
  Ref symbol(std::string_view module, std::string_view name);  ///< the same Ref for the same name
  Ref object(Ref callable, Ref args, bool is_new);
  Ref object_ex(Ref callable, Ref args, Ref kwargs);
  Ref persistent(Ref id);

  /// To a List, Set or Object.
  void append(Ref to, std::span<const Ref> items);
  /// To a Dict or Object: key, value, …
  void append_entries(Ref to, std::span<const Ref> keys_and_values);
  void set_state(Ref object, Ref state);
  /// Replaces the value of a text key, or appends the entry. `dict` is a Dict or an Object with dict items.
  void set(Ref dict, std::string_view key, Ref value);
  void erase(Ref dict, std::string_view key);
  /// Copies what `ref` reaches in `from`, sharing and cycles included.
  Ref import(const Graph& from, Ref ref);

 private:
  friend class Reader;
  struct ObjectPart {
    Ref callable, args, kwargs, state;
    std::uint32_t count;
    Ref* items;
  };
  enum Flag : std::uint8_t { kGrown = 1, kNew = 2, kDictItems = 4, kListItems = 8 };
  struct Node {
    Kind kind;
    std::uint8_t flags = 0;
    std::uint32_t count = 0;  // of bytes or items; of a Symbol: module length << 16 | name length
    union {
      std::int64_t integer;
      double real;
      const char* text;
      Ref* items;
      ObjectPart* object;
    };
  };
  static_assert(sizeof(Node) == 16);

  const Node& node(Ref ref) const { return nodes_[ref]; }
  const Node& expect(Ref ref, Kind kind) const;
  const ObjectPart& object_part(Ref ref) const { return *expect(ref, Kind::Object).object; }
  Ref add(const Node& node);
  Ref add_integer(std::int64_t value);
  Ref add_real(double value);
  Ref add_text(Kind kind, std::string_view bytes);
  Ref add_items(Kind kind, std::span<const Ref> items);
  Ref add_symbol(std::string_view module, std::string_view name);
  const char* keep(std::string_view bytes);
  Ref* keep(std::span<const Ref> refs);
  Ref& item_slot(Ref dict, std::size_t index);
  void extend(Ref to, std::span<const Ref> more);
  void collect(const Graph& from, Ref ref, std::vector<Ref>& reached, std::vector<Ref>& copy_of);
  void copy_links(const Graph& from, Ref old, const std::vector<Ref>& copy_of);

  std::vector<Node> nodes_;
  Arena arena_;
  std::map<std::string, Ref, std::less<>> words_;
};

/// One pickle, whole. Throws BadFormat, "pickle byte 123: …".
Graph parse(std::span<const std::byte> pickle, const Limits& limits = {});

struct Prefix {
  Graph graph;
  std::size_t bytes;  ///< up to and with STOP
};
/// The pickle at the start of `bytes`; nullopt where they end before it does.
std::optional<Prefix> parse_prefix(std::span<const std::byte> bytes, const Limits& limits = {});

struct Name {
  std::string module, name;
  Verdict verdict;
};
/// Every name that pickles would import, each once, in order of appearance: of all that lie one behind another, as
/// pickle.load takes them from a file, or of the five of torch.save before 1.6, behind which storages lie. Refuses no
/// name, but what is no pickle.
std::vector<Name> scan(std::span<const std::byte> pickles);
/// The number that a torch.save file of before 1.6 starts with.
inline constexpr std::string_view kTorchMagic("\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19", 10);

/// The pickle of what `root` reaches: the same bytes for the same graph. Protocol 2 uses only what torch's
/// weights_only reader knows; protocol 4 is what pickle.dump gives by default.
std::string write(const Graph& graph, Ref root, int protocol);

}  // namespace formats::pickle
