// Patterns run in PCRE2.
#include "formats/pattern.h"

#include "formats/json.h"
#include "libshard/error.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

namespace formats {

using shard::Code;

Pattern::Pattern(const std::string& text, std::string where, std::uint32_t most) : where_(std::move(where)), most_(most) {
  int error = 0;
  PCRE2_SIZE at = 0;
  auto* code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C, &error, &at, nullptr);
  shard::require(code != nullptr, Code::BadFormat, [&] { return fmt::format("{}: pattern '{}' cannot be read at {}", where_, shown(text), at); });
  code_.reset(code, pcre2_code_free);
}

std::pair<std::size_t, std::size_t> Pattern::next(std::string_view text, std::size_t from) const {
  const std::unique_ptr<pcre2_match_data, decltype(&pcre2_match_data_free)> data(pcre2_match_data_create(1, nullptr), pcre2_match_data_free);
  const std::unique_ptr<pcre2_match_context, decltype(&pcre2_match_context_free)> context(pcre2_match_context_create(nullptr), pcre2_match_context_free);
  pcre2_set_match_limit(context.get(), most_);
  const int found = pcre2_match(static_cast<pcre2_code*>(code_.get()), reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), from, PCRE2_NO_UTF_CHECK | PCRE2_NOTEMPTY, data.get(),
                                context.get());
  if (found == PCRE2_ERROR_NOMATCH) return {text.npos, text.npos};
  shard::require(found >= 0, Code::BadFormat, [&] { return fmt::format("{}: its pattern gives up on this text (PCRE2 error {})", where_, found); });
  const auto* range = pcre2_get_ovector_pointer(data.get());
  return {range[0], range[1]};
}

}  // namespace formats
