// nlohmann's parser with a callback that watches depth and keys.
#include "formats/json.h"

#include "libshard/error.h"

#include <set>
#include <string>
#include <vector>

namespace formats {

nlohmann::json parse_json(std::string_view text, std::string_view where) {
  constexpr int kDeepest = 256;
  std::vector<std::set<std::string>> keys;
  const auto watch = [&](int depth, nlohmann::json::parse_event_t event, nlohmann::json& value) {
    using Event = nlohmann::json::parse_event_t;
    shard::require(depth < kDeepest, shard::Code::BadFormat, [&] { return fmt::format("{}: JSON is nested deeper than {}", where, kDeepest); });
    if (event == Event::object_start) keys.emplace_back();
    if (event == Event::object_end) keys.pop_back();
    if (event == Event::key)
      shard::require(keys.back().insert(value.get<std::string>()).second, shard::Code::BadFormat,
                     [&] { return fmt::format("{}: key '{}' stands twice", where, value.get<std::string>()); });
    return true;
  };
  try {
    return nlohmann::json::parse(text, watch);
  } catch (const nlohmann::json::exception& error) {
    shard::fail(shard::Code::BadFormat, "{}: {}", where, error.what());
  }
}

}  // namespace formats
