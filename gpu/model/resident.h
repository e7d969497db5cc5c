// A stage's weights in device memory, each at an address of its own that the next checkpoint of the model takes over.
#pragma once

#include "gpu/model/device_ops.h"
#include "lm/weights.h"

#include <map>
#include <string>
#include <vector>

namespace gpu {

class Resident {
 public:
  /// Takes every use from `stream` once, in order, and brings it here. What was here under the same name, type and shape is overwritten in
  /// place; the rest is let go first. Returns when all is there: true where every address is the one it was.
  bool load(lm::WeightStream& stream, const std::vector<lm::WeightUse>& uses, StreamView on);
  bool has(const std::string& name) const { return held_.contains(name); }
  /// Throws Mismatch where it is not here.
  View view(const std::string& name) const;
  /// Bytes.
  std::uint64_t size() const;

 private:
  struct Held {
    DeviceBuffer memory;
    shard::DType type;
    lm::Index rows, columns;
  };
  std::map<std::string, Held> held_;
};

/// Resident weights as one rank takes them.
class RankWeights : public lm::Weights {
 public:
  RankWeights(const Resident& held, DeviceOps& ops) : held_(held), ops_(ops) {}
  bool has(const std::string& name) const override { return held_.has(name); }
  lm::Weight take(const std::string& name, lm::Index lo = 0) override;
  lm::Tensor gather(const std::string& name, const lm::Ids& ids, lm::Index lo, lm::Index hi) override;

 private:
  const Resident& held_;
  DeviceOps& ops_;
};

}  // namespace gpu
