// The graph of a pickle in memory: looking at nodes, building and changing them. Refuses to take one kind of
// node for another.
#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <numeric>

#include "formats/pickle.h"
#include "libshard/error.h"

namespace formats::pickle {
namespace {

using shard::Code;

constexpr Ref kNone = std::numeric_limits<Ref>::max();
constexpr std::size_t kBlock = std::size_t{1} << 20;

/// Latin-1 characters written as UTF-8 back to one byte each; nullopt where one is beyond 255.
std::optional<std::string> latin1_bytes(std::string_view utf8) {
  std::string bytes;
  bytes.reserve(utf8.size());
  for (std::size_t i = 0; i < utf8.size(); ++i) {
    const auto lead = static_cast<unsigned char>(utf8[i]);
    if (lead < 0x80) {
      bytes.push_back(utf8[i]);
    } else if ((lead == 0xC2 || lead == 0xC3) && i + 1 < utf8.size()) {
      bytes.push_back(static_cast<char>((lead & 3) << 6 | (utf8[++i] & 0x3F)));
    } else {
      return std::nullopt;
    }
  }
  return bytes;
}

bool is_latin1(std::string_view encoding) {
  return encoding == "latin1" || encoding == "latin-1" || encoding == "iso-8859-1";
}

/// Without the bytes that only repeat the sign.
std::string_view shortest(std::string_view number) {
  const auto sign_bit = [](char byte) { return (static_cast<unsigned char>(byte) & 0x80) != 0; };
  while (number.size() > 1) {
    const char filler = sign_bit(number[number.size() - 2]) ? '\xFF' : '\0';
    if (number.back() != filler) break;
    number.remove_suffix(1);
  }
  return number;
}

}  // namespace

std::string_view name(Kind kind) {
  constexpr std::string_view kNames[] = {"None", "bool",      "int",  "long integer", "float",
                                         "text", "bytes",     "list", "tuple",        "dict",
                                         "set",  "frozenset", "name", "object",       "persistent id"};
  return kNames[static_cast<std::size_t>(kind)];
}

void* Arena::take_from_new_block(std::size_t bytes) {
  // Large things get a block of their own, so that the rest of the current one is not lost.
  if (bytes > next_ / 4) return blocks_.emplace_back(new char[bytes]).get();
  at_ = blocks_.emplace_back(new char[next_]).get() + bytes;
  left_ = next_ - bytes;
  next_ = std::min(next_ * 2, kBlock);
  return blocks_.back().get();
}

Graph::Graph(std::size_t expected_bytes) : arena_(std::clamp(expected_bytes, std::size_t{256}, kBlock)) {
  // A node takes two bytes of a pickle or more, but for rare ones; pages that stay empty are never touched.
  nodes_.reserve(std::min(expected_bytes / 2 + 16, std::size_t{1} << 26));
  add({.kind = Kind::None, .integer = 0});
  add({.kind = Kind::Bool, .integer = 0});
  add({.kind = Kind::Bool, .integer = 1});
  add({.kind = Kind::Tuple, .items = nullptr});
}

const Graph::Node& Graph::expect(Ref ref, Kind kind) const {
  const Node& found = node(ref);
  if (found.kind != kind) [[unlikely]]
    shard::fail(Code::BadFormat, "pickle: a {} stands where a {} should", pickle::name(found.kind),
                pickle::name(kind));
  return found;
}

bool Graph::boolean(Ref ref) const { return expect(ref, Kind::Bool).integer != 0; }

std::int64_t Graph::integer(Ref ref) const {
  const Node& found = node(ref);
  return found.kind == Kind::Bool ? found.integer : expect(ref, Kind::Int).integer;
}

double Graph::real(Ref ref) const {
  const Node& found = node(ref);
  if (found.kind == Kind::Int || found.kind == Kind::Bool) return static_cast<double>(found.integer);
  return expect(ref, Kind::Float).real;
}

std::string_view Graph::text(Ref ref) const {
  const Node& found = node(ref);
  if (found.kind == Kind::Bytes || found.kind == Kind::BigInt) return {found.text, found.count};
  return {expect(ref, Kind::Text).text, found.count};
}

std::span<const Ref> Graph::items(Ref ref) const {
  const Node& found = node(ref);
  switch (found.kind) {
    case Kind::List:
    case Kind::Tuple:
    case Kind::Dict:
    case Kind::Set:
    case Kind::FrozenSet:
    case Kind::Persistent:
      return {found.items, found.count};
    case Kind::Object:
      return {found.object->items, found.object->count};
    default:
      shard::fail(Code::BadFormat, "pickle: a {} stands where a container should", pickle::name(found.kind));
  }
}

std::string_view Graph::module(Ref symbol) const {
  const Node& found = expect(symbol, Kind::Symbol);
  return {found.text, found.count >> 16};
}

std::string_view Graph::name(Ref symbol) const {
  const Node& found = expect(symbol, Kind::Symbol);
  return {found.text + (found.count >> 16), found.count & 0xFFFF};
}

namespace {
std::optional<Ref> if_any(Ref ref) { return ref == kNone ? std::nullopt : std::optional(ref); }
}  // namespace

Ref Graph::callable(Ref object) const { return object_part(object).callable; }
Ref Graph::args(Ref object) const { return object_part(object).args; }
std::optional<Ref> Graph::kwargs(Ref object) const { return if_any(object_part(object).kwargs); }
std::optional<Ref> Graph::state(Ref object) const { return if_any(object_part(object).state); }
bool Graph::is_new(Ref object) const { return expect(object, Kind::Object).flags & kNew; }
bool Graph::dict_items(Ref object) const { return expect(object, Kind::Object).flags & kDictItems; }

bool Graph::is_text(Ref ref, std::string_view wanted) const {
  return kind(ref) == Kind::Text && text(ref) == wanted;
}

bool Graph::is_symbol(Ref ref, std::string_view module, std::string_view name) const {
  return kind(ref) == Kind::Symbol && this->name(ref) == name && this->module(ref) == module;
}

bool Graph::is_object(Ref ref, std::string_view module, std::string_view name) const {
  return kind(ref) == Kind::Object && is_symbol(callable(ref), module, name);
}

std::optional<Ref> Graph::find(Ref dict, std::string_view key) const {
  const Node& found = node(dict);
  const bool entries = found.kind == Kind::Dict || (found.kind == Kind::Object && found.flags & kDictItems);
  if (!entries) return std::nullopt;
  const auto all = items(dict);
  for (std::size_t i = all.size(); i >= 2; i -= 2) {
    if (is_text(all[i - 2], key)) return all[i - 1];
  }
  return std::nullopt;
}

std::optional<Ref> Graph::attribute(Ref object, std::string_view key) const {
  if (kind(object) != Kind::Object) return std::nullopt;
  const auto given = state(object);
  if (!given) return std::nullopt;
  if (kind(*given) != Kind::Tuple) return find(*given, key);
  const auto pair = items(*given);
  if (pair.size() != 2) return std::nullopt;
  const auto slot = find(pair[1], key);
  return slot ? slot : find(pair[0], key);
}

std::optional<std::string> Graph::bytes_value(Ref ref) const {
  if (kind(ref) == Kind::Bytes) return std::string(text(ref));
  const bool encode = is_object(ref, "_codecs", "encode");
  if (!encode && !is_object(ref, "builtins", "bytes") && !is_object(ref, "builtins", "bytearray")) {
    return std::nullopt;
  }
  const auto given = items(args(ref));
  if (given.empty() && !encode) return std::string();
  if (!encode) {
    // bytearray(_codecs.encode(…)) and no deeper: bytes(bytes(…)) is never written.
    const bool inner =
        given.size() == 1 && (kind(given[0]) == Kind::Bytes || is_object(given[0], "_codecs", "encode"));
    return inner ? bytes_value(given[0]) : std::nullopt;
  }
  const bool latin1 = given.size() == 2 && kind(given[0]) == Kind::Text && kind(given[1]) == Kind::Text &&
                      is_latin1(text(given[1]));
  return latin1 ? latin1_bytes(text(given[0])) : std::nullopt;
}

std::vector<bool> Graph::leading_to(const std::function<bool(Ref)>& wanted) const {
  const auto each_link = [this](Ref ref, const auto& tell) {
    if (kind(ref) < Kind::List || kind(ref) == Kind::Symbol) return;
    for (const auto item : items(ref)) tell(item);
    if (kind(ref) != Kind::Object) return;
    tell(callable(ref)), tell(args(ref));
    if (const auto more = kwargs(ref)) tell(*more);
    if (const auto given = state(ref)) tell(*given);
  };
  std::vector<std::size_t> end(size() + 1);  // of those that name a node, one node's behind the other's
  for (Ref ref = 0; ref < size(); ++ref) each_link(ref, [&](Ref to) { ++end[to]; });
  std::partial_sum(end.begin(), end.end(), end.begin());
  std::vector<Ref> named_by(end.back());
  auto begin = end;
  for (Ref ref = 0; ref < size(); ++ref) each_link(ref, [&](Ref to) { named_by[--begin[to]] = ref; });
  std::vector<bool> out(size());
  std::vector<Ref> stack;
  const auto reach = [&](Ref ref) {
    if (!out[ref]) stack.push_back(ref);
    out[ref] = true;
  };
  for (Ref ref = 0; ref < size(); ++ref)
    if (wanted(ref)) reach(ref);
  while (!stack.empty()) {
    const auto at = stack.back();
    stack.pop_back();
    for (auto i = begin[at]; i < end[at]; ++i) reach(named_by[i]);
  }
  return out;
}

// Building.

Ref Graph::add(const Node& node) {
  nodes_.push_back(node);
  return static_cast<Ref>(nodes_.size() - 1);
}

const char* Graph::keep(std::string_view bytes) {
  if (bytes.empty()) return nullptr;
  return static_cast<const char*>(std::memcpy(arena_.take(bytes.size(), 1), bytes.data(), bytes.size()));
}

Ref* Graph::keep(std::span<const Ref> refs) {
  if (refs.empty()) return nullptr;
  return static_cast<Ref*>(
      std::memcpy(arena_.take(refs.size_bytes(), alignof(Ref)), refs.data(), refs.size_bytes()));
}

Ref Graph::add_text(Kind kind, std::string_view bytes) {
  shard::require(bytes.size() < kNone, Code::BadFormat,
                 [&] { return fmt::format("pickle: a text of {} bytes; at most 4 GiB", bytes.size()); });
  return add({.kind = kind, .count = static_cast<std::uint32_t>(bytes.size()), .text = keep(bytes)});
}

Ref Graph::add_items(Kind kind, std::span<const Ref> items) {
  return add({.kind = kind, .count = static_cast<std::uint32_t>(items.size()), .items = keep(items)});
}

Ref Graph::add_symbol(std::string_view module, std::string_view name) {
  shard::require(module.size() < 0x8000 && name.size() < 0x8000, Code::BadFormat,
                 [] { return "pickle: a name of more than 32767 bytes"; });
  char* const kept = static_cast<char*>(arena_.take(module.size() + name.size(), 1));
  std::copy(module.begin(), module.end(), kept);
  std::copy(name.begin(), name.end(), kept + module.size());
  return add({.kind = Kind::Symbol,
              .count = static_cast<std::uint32_t>(module.size() << 16 | name.size()),
              .text = kept});
}

Ref Graph::add_integer(std::int64_t value) { return add({.kind = Kind::Int, .integer = value}); }
Ref Graph::add_real(double value) { return add({.kind = Kind::Float, .real = value}); }
Ref Graph::text(std::string_view value) { return add_text(Kind::Text, value); }
Ref Graph::bytes(std::string_view value) { return add_text(Kind::Bytes, value); }
Ref Graph::list(std::span<const Ref> items) { return add_items(Kind::List, items); }
Ref Graph::dict(std::span<const Ref> keys_and_values) { return add_items(Kind::Dict, keys_and_values); }
Ref Graph::set(std::span<const Ref> items) { return add_items(Kind::Set, items); }
Ref Graph::frozen_set(std::span<const Ref> items) { return add_items(Kind::FrozenSet, items); }
Ref Graph::tuple(std::span<const Ref> items) {
  return items.empty() ? empty_tuple() : add_items(Kind::Tuple, items);
}
Ref Graph::persistent(Ref id) { return add_items(Kind::Persistent, {&id, 1}); }

Ref Graph::big_integer(std::string_view twos_complement) {
  const std::string_view number = shortest(twos_complement);
  if (number.size() > 8) return add_text(Kind::BigInt, number);
  std::uint64_t value = !number.empty() && number.back() < 0 ? ~std::uint64_t{0} : 0;
  for (std::size_t i = number.size(); i-- > 0;) value = value << 8 | static_cast<unsigned char>(number[i]);
  return integer(static_cast<std::int64_t>(value));
}

Ref Graph::word(std::string_view value) {
  if (const auto known = words_.find(value); known != words_.end()) return known->second;
  return words_.emplace(value, text(value)).first->second;
}

Ref Graph::symbol(std::string_view module, std::string_view name) {
  const std::string key = fmt::format("{}\n{}", module, name);
  if (const auto known = words_.find(key); known != words_.end()) return known->second;
  return words_.emplace(key, add_symbol(module, name)).first->second;
}

Ref Graph::object(Ref callable, Ref args, bool is_new) {
  expect(args, Kind::Tuple);
  auto* const part = static_cast<ObjectPart*>(arena_.take(sizeof(ObjectPart), alignof(ObjectPart)));
  *part = {callable, args, kNone, kNone, 0, nullptr};
  return add({.kind = Kind::Object, .flags = static_cast<std::uint8_t>(is_new ? kNew : 0), .object = part});
}

Ref Graph::object_ex(Ref callable, Ref args, Ref kwargs) {
  expect(kwargs, Kind::Dict);
  const Ref made = object(callable, args, true);
  nodes_[made].object->kwargs = kwargs;
  return made;
}

/// Makes room by doubling, but only from the second time on: most containers are filled at once.
void Graph::extend(Ref to, std::span<const Ref> more) {
  if (more.empty()) return;
  Node& grown = nodes_[to];
  const bool object = grown.kind == Kind::Object;
  std::uint32_t& count = object ? grown.object->count : grown.count;
  Ref*& items = object ? grown.object->items : grown.items;
  const std::size_t wanted = std::size_t{count} + more.size();
  shard::require(wanted < kNone, Code::BadFormat,
                 [] { return "pickle: a container of more than 2^32 items"; });
  if (count == 0) {
    items = keep(more);
  } else {
    if (!(grown.flags & kGrown) || wanted > std::bit_ceil(count)) {
      auto* const larger = static_cast<Ref*>(arena_.take(std::bit_ceil(wanted) * sizeof(Ref), alignof(Ref)));
      std::copy_n(items, count, larger);
      items = larger;
      grown.flags |= kGrown;
    }
    std::copy(more.begin(), more.end(), items + count);
  }
  count = static_cast<std::uint32_t>(wanted);
}

void Graph::append(Ref to, std::span<const Ref> items) {
  Node& grown = nodes_[to];
  const bool object = grown.kind == Kind::Object && !(grown.flags & kDictItems);
  if (!object && grown.kind != Kind::Set) expect(to, Kind::List);
  if (object) grown.flags |= kListItems;
  extend(to, items);
}

void Graph::append_entries(Ref to, std::span<const Ref> keys_and_values) {
  shard::require(keys_and_values.size() % 2 == 0, Code::BadFormat,
                 [] { return "pickle: a key without a value"; });
  Node& grown = nodes_[to];
  const bool object = grown.kind == Kind::Object && !(grown.flags & kListItems);
  if (!object) expect(to, Kind::Dict);
  if (object) grown.flags |= kDictItems;
  extend(to, keys_and_values);
}

void Graph::set_state(Ref object, Ref state) { expect(object, Kind::Object).object->state = state; }

Ref& Graph::item_slot(Ref dict, std::size_t index) {
  Node& found = nodes_[dict];
  return (found.kind == Kind::Object ? found.object->items : found.items)[index];
}

void Graph::set(Ref dict, std::string_view key, Ref value) {
  const auto all = items(dict);
  for (std::size_t i = find(dict, key) ? all.size() : 0; i >= 2; i -= 2) {
    if (is_text(all[i - 2], key)) {
      item_slot(dict, i - 1) = value;
      return;
    }
  }
  const Ref entry[] = {text(key), value};
  append_entries(dict, entry);
}

void Graph::erase(Ref dict, std::string_view key) {
  if (!find(dict, key)) return;
  const auto all = items(dict);
  std::size_t kept = 0;
  for (std::size_t i = 0; i + 1 < all.size(); i += 2) {
    if (is_text(all[i], key)) continue;
    item_slot(dict, kept) = all[i];
    item_slot(dict, kept + 1) = all[i + 1];
    kept += 2;
  }
  Node& found = nodes_[dict];
  (found.kind == Kind::Object ? found.object->count : found.count) = static_cast<std::uint32_t>(kept);
  // Growing doubles from the count that is left, so what remains counts as filled at once.
  found.flags &= static_cast<std::uint8_t>(~kGrown);
}

}  // namespace formats::pickle
