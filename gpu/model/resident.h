// A stage's weights in device memory, each at an address of its own that the next checkpoint of the model takes over.
#pragma once

#include "gpu/model/device_ops.h"
#include "lm/weights.h"

#include <map>
#include <string>
#include <vector>

namespace gpu {

class Resident : public lm::Weights {
 public:
  explicit Resident(DeviceOps& ops) : ops_(ops) {}
  /// Takes every use from `stream` once, in order, and brings it here. What was here under the same name, type and shape is overwritten in
  /// place; the rest is let go first. True where every address is the one it was.
  bool load(lm::WeightStream& stream, const std::vector<lm::WeightUse>& uses);

  bool has(const std::string& name) const override { return held_.contains(name); }
  lm::Weight take(const std::string& name, lm::Index lo = 0) override;
  lm::Tensor gather(const std::string& name, const lm::Ids& ids, lm::Index lo, lm::Index hi) override;
  /// Bytes.
  std::uint64_t size() const;

 private:
  struct Held {
    DeviceBuffer memory;
    shard::DType type;
    lm::Index rows, columns;
  };
  View view(const std::string& name) const;

  DeviceOps& ops_;
  std::map<std::string, Held> held_;
};

}  // namespace gpu
