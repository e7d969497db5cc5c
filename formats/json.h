// JSON from strangers: one UTF-8 document, not too deep, no key twice in an object.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace formats {

/// Throws BadFormat with `where` in front.
nlohmann::json parse_json(std::string_view text, std::string_view where);

/// What a parser that is called directly needs as well: BadFormat where the text holds a NUL.
void check_json_text(std::string_view text, std::string_view where);
/// The beginning of a stranger's text as one printable line, to be quoted.
std::string shown(std::string_view text);
/// The parser's complaint as one printable line; it may quote the stranger's bytes.
std::string json_problem(const nlohmann::json::exception& error);

}  // namespace formats
