// Text to token ids, as tokenizer.json says: byte-pair encoding with the usual splits.
#pragma once

#include <atomic>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace formats {

/// More ids than any one pass takes; who asks for more named another file than was meant.
constexpr std::size_t kMostIds = 4u << 20;
/// Bytes of a text, likewise.
constexpr std::uint64_t kLargestText = 16u << 20;

/// One tokenizer.json of Hugging Face's tokenizers. Kinds of steps that are not understood are refused by their name.
class Tokenizer {
 public:
  /// Throws NotFound, BadFormat.
  explicit Tokenizer(const std::filesystem::path& path);
  ~Tokenizer();
  /// The ids of a UTF-8 text with the tokens that the post-processor adds around it; `where` names the text in messages. Throws BadFormat where the
  /// text is no UTF-8 or becomes too much, Io once `stop` is set.
  std::vector<std::int64_t> encode(std::string_view text, std::string_view where = "text", const std::atomic<bool>* stop = nullptr) const;

 private:
  struct Parts;
  std::string path_;
  std::unique_ptr<const Parts> parts_;
};

}  // namespace formats
