// Processes that compute one model together, each of them one of its ranks: tensor ranks of a stage next to each other, then the next stage.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace lm {

class Processes {
 public:
  virtual ~Processes() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  /// Every rank's text, by rank; all must make the same calls in the same order. Throws what another rank failed with.
  virtual std::vector<std::string> all_gather(std::string_view mine) = 0;
};

}  // namespace lm
