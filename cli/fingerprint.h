// What tells one conversion from another, for processes that do one together: nothing in it depends on where the source lies.
#pragma once

#include "cli/print.h"
#include "formats/checkpoint.h"
#include "libshard/plan.h"

#include <filesystem>
#include <string>
#include <vector>

namespace cli {

/// Names of files and patterns may hold any bytes.
inline std::string plain_text(const Json& json, int indent = -1) { return json.dump(indent, ' ', false, Json::error_handler_t::replace); }

struct Fingerprint {
  Json options;             ///< flag → value, of those that shape the output
  Json source;              ///< "iteration"; "files": a digest of names and sizes; "times": one of their times of change, in ns
  std::string whole() const { return plain_text(options) + plain_text(source); }
};

/// Of the files that are read: weights, metadata, configuration and tokenizer, and those of `adapter` ("": none).
Json source_facts(const formats::Checkpoint& source, const std::filesystem::path& adapter);

/// What is copied where, and into which files.
std::string fingerprint(const shard::Plan& plan, const shard::ShardedStateDict& target, const std::vector<std::string>& files);

/// The digest of a text.
std::string digest_of(std::string_view text);

}  // namespace cli
