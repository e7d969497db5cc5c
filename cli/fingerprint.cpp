// Digests over numbers and names; files are known by their facts, not by their bytes, which may be terabytes.
#include "cli/fingerprint.h"

#include "formats/hash.h"
#include "formats/hf/state.h"

#include <set>

#include <sys/stat.h>

namespace cli {
namespace {

namespace fs = std::filesystem;

/// Numbers and names, folded into one digest.
class Folding {
 public:
  void add(std::uint64_t number) {
    text_.append(reinterpret_cast<const char*>(&number), sizeof number);
    if (text_.size() > kFold) text_ = folded();
  }
  void add(const std::string& name) {
    add(name.size());
    text_ += name;
  }
  std::string folded() const { return digest_of(text_); }

 private:
  static constexpr std::size_t kFold = 1 << 20;
  std::string text_;
};

/// Beside weights, what a reader of some format looks into.
constexpr const char* kMetadata[] = {".metadata", "common.pt", "metadata.json", "config.json", "adapter_config.json", "model.safetensors.index.json"};

}  // namespace

std::string digest_of(std::string_view text) { return formats::hex(formats::hash_bytes(std::as_bytes(std::span(text)))); }

Json source_facts(const formats::Checkpoint& source, const fs::path& adapter) {
  Folding names, times;
  const auto add = [&](const fs::path& folder, const std::string& name) {
    struct stat info {};
    if (::stat((folder / name).c_str(), &info) != 0 || !S_ISREG(info.st_mode)) return;
    names.add(name), names.add(static_cast<std::uint64_t>(info.st_size));
    times.add(static_cast<std::uint64_t>(info.st_mtim.tv_sec)), times.add(static_cast<std::uint64_t>(info.st_mtim.tv_nsec));
  };
  std::set<std::string> own(source.stored.files.begin(), source.stored.files.end());
  own.insert(std::begin(kMetadata), std::end(kMetadata));
  for (const auto& name : own) add(source.folder, name);
  if (source.hf)
    for (const auto& name : source.hf->files) add(source.hf->folder, name);
  std::set<std::string> merged;
  std::error_code error;
  for (fs::directory_iterator at(adapter, error), end; !error && at != end; at.increment(error))
    if (const auto name = at->path().filename().string(); name.starts_with("adapter_")) merged.insert(name);
  for (const auto& name : merged) add(adapter, name);
  // As the folder is called: what is copied or renamed may say another number inside.
  const auto name = formats::as_written(source.folder).filename().string();
  const auto iteration = formats::names_iteration(name) ? Json(name) : source.iteration ? Json(*source.iteration) : Json(nullptr);
  return {{"iteration", iteration}, {"files", names.folded()}, {"times", times.folded()}};
}

std::string fingerprint(const shard::Plan& plan, const shard::ShardedStateDict& target, const std::vector<std::string>& files) {
  Folding out;
  for (const auto& name : files) out.add(name);
  for (const auto& stream : target.streams) out.add(stream.file), out.add(stream.offset), out.add(stream.size);
  for (const auto& copy : plan.copies) {
    out.add(copy.from_stream), out.add(copy.to_stream), out.add(copy.from), out.add(copy.to), out.add(copy.run);
    out.add(static_cast<std::uint64_t>(copy.from_type) << 8 | static_cast<std::uint64_t>(copy.to_type));
    for (const auto& step : copy.steps) out.add(static_cast<std::uint64_t>(step.count)), out.add(static_cast<std::uint64_t>(step.from)), out.add(static_cast<std::uint64_t>(step.to));
  }
  for (const auto& row : plan.memory) out.add(formats::hex(formats::hash_bytes(row)));
  return out.folded();
}

}  // namespace cli
