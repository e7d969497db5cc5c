// Text to token ids, as tokenizer.json says: byte-pair encoding with the usual splits.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace formats {

/// One tokenizer.json of Hugging Face's tokenizers. Kinds of steps that are not understood are refused by their name.
class Tokenizer {
 public:
  /// Throws NotFound, BadFormat.
  explicit Tokenizer(const std::filesystem::path& path);
  ~Tokenizer();
  /// The ids of a UTF-8 text with the tokens that the post-processor adds around it. Throws BadFormat where the text is no UTF-8.
  std::vector<std::int64_t> encode(std::string_view text) const;

 private:
  struct Parts;
  std::unique_ptr<const Parts> parts_;
};

}  // namespace formats
