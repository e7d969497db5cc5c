// Whole layers or experts that stand in another order: which one of b is which one of a, and what that order is called.
#pragma once

#include "libshard/hints/sample.h"

#include <map>
#include <set>
#include <string>

namespace shard::hints {

/// "layers.12.mlp.up.weight" is {"layers.", 12, "mlp.up.weight"}; experts count within their layer. number -1: none.
struct Numbered {
  std::string head;
  Index number = -1;
  std::string tail;
  std::string with(Index other) const { return head + std::to_string(other) + "." + tail; }
};
Numbered layer_of(const std::string& key);
Numbered expert_of(const std::string& key);

/// Which number of a each number of b is; empty: no other order was found.
struct Order {
  std::map<Index, Index> from;
  std::string name;
};

/// The order of the layers, from fingerprints of the tensors of every layer. `keys` are those that differ.
Order layer_order(const Both& both, const std::set<std::string>& keys, HashBytes hash);
/// The order of the experts that stand beside `key`.
Order expert_order(const Both& both, const Numbered& key, HashBytes hash);

/// The sequence of layers as the stages of a VPP layout hold them, stage by stage; empty where it does not divide.
std::vector<Index> vpp_sequence(Index layers, Index pp, Index vpp);

}  // namespace shard::hints
