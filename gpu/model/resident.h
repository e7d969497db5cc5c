// A rank's parts of weights in device memory, each at an address of its own that the next checkpoint of the model takes over.
#pragma once

#include "gpu/model/device_ops.h"
#include "lm/parts.h"

#include <map>
#include <string>

namespace gpu {

class Resident {
 public:
  /// Makes room for `parts`. What is here as the same part of the same name stays at its address, to be overwritten; the rest is let go first, when
  /// `on` has done its work. True where every address is the one it was.
  bool hold(const lm::Parts& parts, StreamView on);
  bool has(const std::string& name) const { return held_.contains(name); }
  /// Throws Mismatch where it is not here.
  View view(const std::string& name) const;
  const shard::Box& box(const std::string& name) const;
  /// Bytes.
  std::uint64_t size() const;

 private:
  struct Held {
    DeviceBuffer memory;
    lm::Part part;
  };
  const Held& at(const std::string& name) const;
  std::map<std::string, Held> held_;
};

/// Resident weights as layers take them.
class RankWeights : public lm::Weights {
 public:
  /// Keeps references to both.
  RankWeights(const Resident& held, DeviceOps& ops) : held_(held), ops_(ops) {}
  bool has(const std::string& name) const override { return held_.has(name); }
  lm::Weight take(const std::string& name, lm::Index lo = 0) override;
  lm::Tensor gather(const std::string& name, const lm::Ids& ids, lm::Index lo, lm::Index hi) override;

 private:
  const Resident& held_;
  DeviceOps& ops_;
};

}  // namespace gpu
