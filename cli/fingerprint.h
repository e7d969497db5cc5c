// What tells one conversion from another, for processes that do one together: nothing in it depends on where the source lies.
#pragma once

#include "cli/print.h"
#include "formats/checkpoint.h"
#include "libshard/plan.h"

#include <filesystem>
#include <string>
#include <vector>

namespace cli {

struct Fingerprint {
  Json options;             ///< flag → value, of those that shape the output
  Json source;              ///< "iteration"; "files": a digest of names and sizes; "times": one of their times of change, in ns
  std::string whole() const { return options.dump() + source.dump(); }
};

/// Of the files that are read: weights, metadata, configuration and tokenizer, and those of `adapter` ("": none).
Json source_facts(const formats::Checkpoint& source, const std::filesystem::path& adapter);

/// What is copied where, and into which files.
std::string fingerprint(const shard::Plan& plan, const shard::ShardedStateDict& target, const std::vector<std::string>& files);

/// The digest of a text.
std::string digest_of(std::string_view text);

}  // namespace cli
