// What a conversion's output would replace, and must not.
#pragma once

#include "formats/checkpoint.h"

#include <filesystem>
#include <string>
#include <vector>

namespace cli {

/// For --force, which removes what `target` is or holds: throws Usage where that is one of `read` ("": none), or a file of the source. What links of the
/// source lead to (a cache's blobs) is read, too.
void refuse_source_in_target(const std::filesystem::path& target, const std::vector<std::filesystem::path>& read, const formats::Checkpoint& source);

/// A Megatron run folder that --force replaces loses every iteration, not only one: says so; "" where it holds no two.
std::string lost_iterations(const std::filesystem::path& target);

/// A report in `target` has a place beside the output's `files`. Throws Usage where it is one of them, or where `target` is not there in the end (`late`), Io
/// where it cannot be a file there.
void refuse_report_in_target(const std::filesystem::path& report, const std::filesystem::path& target, const std::vector<std::string>& files, bool late);

}  // namespace cli
