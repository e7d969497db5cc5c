// A SAX reader straight into entries: no document tree, no recursion, no key twice.
#include "formats/safetensors/header.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <set>
#include <unordered_set>

#include "formats/json.h"
#include "formats/text_splits.h"
#include "libshard/error.h"

namespace formats::safetensors {
namespace {

using shard::Code;

constexpr std::string_view kMetadata = "__metadata__";
constexpr std::size_t kMostDims = 64;
constexpr int kDeepest = 256;

std::string shown(std::string_view name) {
  constexpr auto kReplace = nlohmann::json::error_handler_t::replace;
  return nlohmann::json(name).dump(-1, ' ', false, kReplace);
}

/// What one tensor's record says so far.
struct Record {
  std::string dtype;
  std::vector<std::uint64_t> shape, offsets;
  bool has_dtype = false, has_shape = false, has_offsets = false;
};

/// The shape in elements of the record's type; packed types as bytes. nullopt where a byte is not filled.
std::optional<shard::Shape> carried_shape(const Record& record, shard::DType dtype) {
  shard::Shape out;
  for (const auto size : record.shape) {
    if (size > INT64_MAX) return std::nullopt;
    out.push_back(static_cast<shard::Index>(size));
  }
  if (dtype != shard::DType::F4E2M1x2) return out;
  if (out.empty() || out.back() % 2 != 0) return std::nullopt;
  out.back() /= 2;
  return out;
}

std::optional<std::uint64_t> bytes_of(const shard::Shape& shape, shard::DType dtype) {
  auto out = static_cast<std::uint64_t>(size_of(dtype));
  if (std::find(shape.begin(), shape.end(), 0) != shape.end()) return 0;
  for (const auto size : shape)
    if (__builtin_mul_overflow(out, static_cast<std::uint64_t>(size), &out)) return std::nullopt;
  if (out > INT64_MAX) return std::nullopt;
  return out;
}

class Handler : public nlohmann::json_sax<nlohmann::json> {
 public:
  explicit Handler(std::string_view where) : where_(where) {}
  Header header;

  bool key(string_t& value) override {
    if (skipping_) return true;
    if (in_ == In::Root) {
      if (!names_.insert(value).second) refuse(value, "stands twice");
      name_ = value;
    } else {
      if (!fields_.insert(value).second) refuse(name_, "has a field twice");
      field_ = value;
    }
    return true;
  }
  bool start_object(std::size_t) override {
    if (skipping_) return deeper();
    switch (in_) {
      case In::Nothing:
        in_ = In::Root;
        return true;
      case In::Root:
        in_ = name_ == kMetadata ? In::Metadata : In::Record;
        record_ = {};
        fields_.clear();
        return true;
      default:
        return skip("an object");
    }
  }
  bool end_object() override {
    if (skipping_) return shallower();
    if (in_ == In::Record) finish();
    in_ = in_ == In::Root ? In::Nothing : In::Root;
    return true;
  }
  bool start_array(std::size_t) override {
    if (skipping_) return deeper();
    if (in_ != In::Record || (field_ != "shape" && field_ != "data_offsets")) return skip("an array");
    in_ = In::Array;
    (field_ == "shape" ? record_.has_shape : record_.has_offsets) = true;
    return true;
  }
  bool end_array() override {
    if (skipping_) return shallower();
    in_ = In::Record;
    return true;
  }
  bool string(string_t& value) override {
    if (skipping_) return true;
    if (in_ == In::Metadata) {
      header.metadata[field_] = std::move(value);
    } else if (in_ == In::Record && field_ == "dtype") {
      record_.dtype = std::move(value);
      record_.has_dtype = true;
    } else {
      return ignore("a text");
    }
    return true;
  }
  bool number_unsigned(number_unsigned_t value) override {
    if (skipping_ || in_ != In::Array) return ignore("a number");
    auto& numbers = field_ == "shape" ? record_.shape : record_.offsets;
    if (numbers.size() >= kMostDims) refuse(name_, "has more numbers than any tensor");
    numbers.push_back(value);
    return true;
  }
  bool number_integer(number_integer_t) override { return ignore("a negative number"); }
  bool number_float(number_float_t, const string_t&) override {
    return ignore("a number that is no whole 64-bit one");
  }
  bool null() override { return ignore("null"); }
  bool boolean(bool) override { return ignore("true or false"); }
  bool binary(binary_t&) override { return ignore("binary"); }
  bool parse_error(std::size_t, const std::string&, const nlohmann::json::exception& error) override {
    shard::fail(Code::BadFormat, "{}: header: {}", where_, json_problem(error));
  }

 private:
  enum class In { Nothing, Root, Metadata, Record, Array };

  [[noreturn]] void refuse(std::string_view what, std::string_view problem) const {
    shard::fail(Code::BadFormat, "{}: header: {} {}", where_, shown(what), problem);
  }
  /// Readers ignore fields of a record that they do not know, whatever stands there.
  bool unknown_field() const {
    return in_ == In::Record && field_ != "dtype" && field_ != "shape" && field_ != "data_offsets";
  }
  bool ignore(const char* what) const {
    if (!skipping_ && !unknown_field()) refuse(name_, fmt::format("holds {} where none belongs", what));
    return true;
  }
  bool skip(const char* what) {
    ignore(what);
    return deeper();
  }
  bool deeper() {
    if (++skipping_ >= kDeepest) refuse(name_, "is nested too deep");
    return true;
  }
  bool shallower() {
    --skipping_;
    return true;
  }

  shard::DType dtype() const {
    const auto found = shard::dtype_named(record_.dtype);
    if (!found || safetensors_name(*found) != record_.dtype)
      refuse(name_, fmt::format("has dtype {}, which is not supported", shown(record_.dtype)));
    return *found;
  }

  void finish() {
    if (!record_.has_dtype || !record_.has_shape || record_.offsets.size() != 2)
      refuse(name_, "needs dtype, shape and two data_offsets");
    const auto type = dtype();
    auto shape = carried_shape(record_, type);
    if (!shape)
      refuse(name_, "has a shape beyond 63 bits, or rows of 4-bit elements that fill no whole bytes");
    const auto bytes = bytes_of(*shape, type);
    if (!bytes) refuse(name_, "has more bytes than 63 bits count");
    const auto begin = record_.offsets[0], end = record_.offsets[1];
    if (begin > end || end - begin != *bytes)
      refuse(name_, fmt::format("has data_offsets [{}, {}]; its shape {} needs {} bytes", begin, end,
                                shard::to_string(*shape), *bytes));
    header.entries.push_back({name_, type, std::move(*shape), begin, end});
  }

  std::string_view where_;
  In in_ = In::Nothing;
  int skipping_ = 0;  ///< levels inside a value that is ignored
  std::string name_, field_;
  Record record_;
  std::unordered_set<std::string> names_;
  std::set<std::string> fields_;
};

/// Entries by begin take up the data from its first byte to its last, each byte once.
void check_cover(const std::vector<Entry>& entries, std::uint64_t data_bytes, std::string_view where) {
  std::uint64_t at = 0;
  for (const auto& entry : entries) {
    shard::require(entry.begin == at, Code::BadFormat, [&] {
      return fmt::format("{}: {} starts at byte {}; should be {} ({})", where, shown(entry.name), entry.begin,
                         at, entry.begin < at ? "overlap" : "gap");
    });
    at = entry.end;
  }
  shard::require(at == data_bytes, Code::BadFormat, [&] {
    return fmt::format("{}: tensors end at data byte {}; the file holds {}", where, at, data_bytes);
  });
}

bool by_begin(const Entry& a, const Entry& b) {
  return a.begin != b.begin ? a.begin < b.begin : a.end < b.end;
}

void add_entry(const Entry& entry, std::string& json) {
  shard::require(!safetensors_name(entry.dtype).empty() && entry.name != kMetadata, Code::BadFormat, [&] {
    return fmt::format("{}: {} has no place in safetensors", shown(entry.name), shard::name(entry.dtype));
  });
  auto shape = entry.shape;
  if (entry.dtype == shard::DType::F4E2M1x2 && !shape.empty()) shape.back() *= 2;
  json += json.size() > 1 ? "," : "";
  json += nlohmann::json(entry.name).dump();
  fmt::format_to(std::back_inserter(json), R"(:{{"dtype":"{}","shape":[{}],"data_offsets":[{},{}]}})",
                 safetensors_name(entry.dtype), fmt::join(shape, ","), entry.begin, entry.end);
}

std::string header_json(std::span<const Entry> entries, const std::map<std::string, std::string>& metadata) {
  std::string out = "{";
  try {
    if (!metadata.empty()) out += fmt::format("\"{}\":{}", kMetadata, nlohmann::json(metadata).dump());
    for (const auto& entry : entries) {
      shard::require(is_utf8(entry.name), Code::BadFormat, [&] { return fmt::format("{}: the name is no UTF-8, which safetensors' are", shown(entry.name)); });
      add_entry(entry, out);
    }
  } catch (const nlohmann::json::exception& error) {  // metadata that is no UTF-8
    shard::fail(Code::BadFormat, "safetensors header: {}", json_problem(error));
  }
  return out + "}";
}

}  // namespace

Header parse_header(std::string_view json, std::uint64_t data_bytes, std::string_view where) {
  const auto first = json.find_first_not_of(" \t\n\r");
  shard::require(first != json.npos && json[first] == '{', Code::BadFormat,
                 [&] { return fmt::format("{}: header is no JSON object", where); });
  check_json_text(json, where);
  Handler handler(where);
  nlohmann::json::sax_parse(json, &handler);
  auto& entries = handler.header.entries;
  std::stable_sort(entries.begin(), entries.end(), by_begin);
  check_cover(entries, data_bytes, where);
  return std::move(handler.header);
}

Header read_header(const File& file) {
  shard::require(file.size() >= 8, Code::BadFormat, [&] {
    return fmt::format("{}: {} bytes; a safetensors file has at least 8", file.name(), file.size());
  });
  std::uint64_t length = 0;
  file.read(0, std::as_writable_bytes(std::span(&length, 1)));
  shard::require(length <= kMaxHeaderBytes && length <= file.size() - 8, Code::BadFormat, [&] {
    return fmt::format("{}: header of {} bytes; the file has {}, the limit is {}", file.name(), length,
                       file.size(), kMaxHeaderBytes);
  });
  auto header = parse_header(file.text(8, length), file.size() - 8 - length, file.name());
  header.data_offset = 8 + length;
  return header;
}

std::string write_header(std::span<const Entry> entries, const std::map<std::string, std::string>& metadata) {
  auto json = header_json(entries, metadata);
  json.resize((json.size() + 7) / 8 * 8, ' ');
  const std::uint64_t length = json.size();
  shard::require(length <= kMaxHeaderBytes, Code::BadFormat, [&] {
    return fmt::format("safetensors header of {} bytes; readers take {}: fewer tensors a file, please",
                       length, kMaxHeaderBytes);
  });
  std::string out(8, '\0');
  std::memcpy(out.data(), &length, 8);
  return out + json;
}

}  // namespace formats::safetensors
