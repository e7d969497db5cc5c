// Regular expressions from strangers: compiled once, given up when matching takes too long.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

namespace formats {

/// A compiled pattern; copies share it. Texts are UTF-8.
class Pattern {
 public:
  /// `where` stands in front of messages; matching gives up after `most` steps. Throws BadFormat where the text is no pattern.
  Pattern(const std::string& text, std::string where, std::uint32_t most);
  /// The next match that is not empty, from `from`: [begin, end); begin is npos where there is none.
  std::pair<std::size_t, std::size_t> next(std::string_view text, std::size_t from) const;

 private:
  std::shared_ptr<void> code_;
  std::string where_;
  std::uint32_t most_;
};

}  // namespace formats
