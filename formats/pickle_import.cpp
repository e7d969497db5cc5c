// Copying a part of one graph into another: first a new number for every node that is reached, then their
// links.
#include <limits>

#include "formats/pickle.h"

namespace formats::pickle {
namespace {

constexpr Ref kNone = std::numeric_limits<Ref>::max();

}  // namespace

void Graph::collect(const Graph& from, Ref ref, std::vector<Ref>& reached, std::vector<Ref>& copy_of) {
  const auto visit = [&](Ref old) {
    if (old == kNone || copy_of[old] != kNone) return;
    const Node node = from.node(old);
    const bool fixed = old <= empty_tuple();
    const bool text = node.kind == Kind::Text || node.kind == Kind::Bytes || node.kind == Kind::BigInt;
    if (fixed) {
      copy_of[old] = old;
    } else if (node.kind == Kind::Symbol) {
      const std::string module(from.module(old)), symbol(from.name(old));
      copy_of[old] = this->symbol(module, symbol);
    } else {
      copy_of[old] = text ? add_text(node.kind, from.text(old)) : add(node);
      reached.push_back(old);
    }
  };
  visit(ref);
  for (std::size_t next = 0; next < reached.size(); ++next) {
    const Ref old = reached[next];
    const Kind kind = from.kind(old);
    if (kind < Kind::List || kind == Kind::Symbol) continue;
    for (const Ref item : from.items(old)) visit(item);
    if (kind != Kind::Object) continue;
    const ObjectPart part = from.object_part(old);
    for (const Ref link : {part.callable, part.args, part.kwargs, part.state}) visit(link);
  }
}

void Graph::copy_links(const Graph& from, Ref old, const std::vector<Ref>& copy_of) {
  if (from.kind(old) < Kind::List) return;
  const auto copied = [&](Ref link) { return link == kNone ? kNone : copy_of[link]; };
  Ref* const items = keep(from.items(old));
  const std::size_t count = from.items(old).size();
  for (std::size_t i = 0; i < count; ++i) items[i] = copied(items[i]);
  Node& made = nodes_[copy_of[old]];
  made.flags &= static_cast<std::uint8_t>(~kGrown);
  if (made.kind != Kind::Object) {
    made.items = items;
    return;
  }
  const ObjectPart part = from.object_part(old);
  made.object = static_cast<ObjectPart*>(arena_.take(sizeof(ObjectPart), alignof(ObjectPart)));
  *made.object = {copied(part.callable), copied(part.args), copied(part.kwargs),
                  copied(part.state),    part.count,        items};
}

Ref Graph::import(const Graph& from, Ref ref) {
  std::vector<Ref> copy_of(from.size(), kNone), reached;
  collect(from, ref, reached, copy_of);
  for (const Ref old : reached) copy_links(from, old, copy_of);
  return copy_of[ref];
}

}  // namespace formats::pickle
