// Several processes that carry out one conversion together, on storage that they share.
#pragma once

#include "formats/local_writer.h"
#include "libshard/execute.h"

#include <nlohmann/json.hpp>

#include <filesystem>
#include <optional>
#include <span>
#include <string>

namespace cli {

/// "2/4": the second of four.
struct Part {
  std::size_t index, count;
};
/// Throws Usage.
Part parse_part(const std::string& text);

/// The folder that all parts write to, beside the final one; made if it is not there.
std::filesystem::path joint_folder(const std::filesystem::path& target, const Part& part, bool force);

/// Leaves this part's sums beside the folder. The process that finds every part done closes the archives, gives the
/// folder its final name, and gets true.
bool finish_part(const std::filesystem::path& target, const Part& part, const shard::Report& report, formats::LocalWriter& writer, bool force, bool sync);

/// A part's sums, as pairs of stream and sum; and the sums of all streams from those of all parts and what `report` holds.
nlohmann::json sums_of(const shard::Report& report);
std::vector<std::optional<std::uint32_t>> join_sums(std::span<const nlohmann::json> parts, const shard::Report& report, const formats::LocalWriter& writer);

}  // namespace cli
