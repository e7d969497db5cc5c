// Text inside XML and HTML, and the files that hold it.
#pragma once

#include <string>
#include <string_view>

namespace cli {

/// What is no character of XML 1.0 in UTF-8 becomes '?'.
std::string printable(std::string_view text);
/// Safe as text and inside quotes, and printable.
std::string escaped(std::string_view text);
/// Throws Io.
void write_text(const std::string& path, std::string_view text);

}  // namespace cli
