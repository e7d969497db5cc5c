// Strangers' text inside XML and HTML, and on terminals.
#pragma once

#include <string>
#include <string_view>

namespace cli {

/// What is no character of XML 1.0 in UTF-8 becomes '?'.
std::string printable(std::string_view text);
/// Safe as text and inside quotes, and printable.
std::string escaped(std::string_view text);
/// For a terminal: printable, in one line, and without what moves the cursor or turns the direction of writing.
std::string one_line(std::string_view text);

}  // namespace cli
