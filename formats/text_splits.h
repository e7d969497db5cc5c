// How a text falls into words before byte-pair merging: the pre-tokenizers of tokenizer.json.
#pragma once

#include <nlohmann/json.hpp>

#include <atomic>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace formats {

/// Appends the pieces of one text; `first` where it is the beginning of the whole. Throws Io once `stop` is set.
using Split = std::function<void(const std::string& text, bool first, const std::atomic<bool>* stop, std::vector<std::string>& out)>;

/// The steps of a pre_tokenizer, in order. Throws BadFormat naming a kind that is not known.
void add_splits(const nlohmann::json& step, std::vector<Split>& out);

bool is_utf8(std::string_view text);
/// "NFC", "NFD", "NFKC", "NFKD".
std::string normal_form(const std::string& text, const std::string& form);

}  // namespace formats
