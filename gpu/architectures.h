// Which devices a build has code for: its list of architectures, as CMake spells it with commas, against a compute capability.
#pragma once

#include <charconv>
#include <string_view>

namespace gpu {

/// "80-real": code for 8.0 and later 8.x; "90a-real": for 9.0 alone; "100-virtual": the driver makes it for 10.0 and all later ones;
/// "80": both.
inline bool has_code(std::string_view architectures, int major, int minor) {
  while (!architectures.empty()) {
    const auto one = architectures.substr(0, architectures.find(','));
    architectures.remove_prefix(one.size() + (one.size() < architectures.size()));
    int number = 0;
    const auto* const after = std::from_chars(one.data(), one.data() + one.size(), number).ptr;
    const auto rest = one.substr(static_cast<std::size_t>(after - one.data()));
    const bool exact = rest.starts_with("a"), real = !rest.ends_with("-virtual"), made_later = !exact && !rest.ends_with("-real");
    if (number == 10 * major + minor) return true;
    if (real && !exact && number / 10 == major && number % 10 <= minor) return true;
    if (made_later && number <= 10 * major + minor) return true;
  }
  return false;
}

}  // namespace gpu
