// JSON from strangers: one UTF-8 document, not too deep, no key twice in an object.
#pragma once

#include <nlohmann/json.hpp>

#include <string_view>

namespace formats {

/// Throws BadFormat with `where` in front.
nlohmann::json parse_json(std::string_view text, std::string_view where);

}  // namespace formats
