// A SAX reader straight into entries: no document tree, no recursion, no key twice.
#include "formats/safetensors/header.h"

#include "formats/json.h"
#include "libshard/error.h"

#include <algorithm>
#include <cstring>
#include <set>

namespace formats::safetensors {
namespace {

using shard::Code;

/// What one tensor's record says so far.
struct Record {
  std::string dtype;
  std::vector<std::uint64_t> shape, offsets;
  bool has_dtype = false, has_shape = false, has_offsets = false;
};

class Handler : public nlohmann::json_sax<nlohmann::json> {
 public:
  explicit Handler(std::string_view where) : where_(where) {}
  Header header;

  bool key(string_t& value) override {
    if (skip_) return true;
    if (level_ == 1) {
      refuse_unless(names_.insert(value).second, "stands twice", value);
      name_ = value;
    } else {
      refuse_unless(fields_.insert(value).second, "has a field twice", name_);
      field_ = value;
    }
    return true;
  }
  bool start_object(std::size_t) override {
    if (skip_ || level_ == 2) return skip_ ? deeper() : skip();
    ++level_;
    if (level_ == 2) record_ = {}, fields_.clear(), field_.clear();
    return true;
  }
  bool end_object() override {
    if (skip_) return shallower();
    if (level_ == 2 && name_ != "__metadata__") finish();
    --level_;
    return true;
  }
  bool start_array(std::size_t) override {
    refuse_unless(level_ > 0, "is no object", "header");
    if (skip_) return deeper();
    if (level_ == 2 && name_ != "__metadata__" && !in_array_ && (field_ == "shape" || field_ == "data_offsets")) {
      in_array_ = true;
      (field_ == "shape" ? record_.has_shape : record_.has_offsets) = true;
      return true;
    }
    refuse_unless(level_ == 2 && name_ != "__metadata__" && !in_array_, "holds an array where none belongs", name_);
    return skip();
  }
  bool end_array() override {
    if (skip_) return shallower();
    in_array_ = false;
    return true;
  }
  bool string(string_t& value) override {
    if (skip_) return true;
    refuse_unless(level_ == 2 && !in_array_, "holds a text where none belongs", name_);
    if (name_ == "__metadata__") header.metadata[field_] = value;
    else if (field_ == "dtype") record_.dtype = value, record_.has_dtype = true;
    return true;
  }
  bool number_unsigned(number_unsigned_t value) override {
    if (skip_) return true;
    refuse_unless(level_ == 2 && name_ != "__metadata__", "holds a number where none belongs", name_);
    if (!in_array_) return true;  // an unknown field
    auto& numbers = field_ == "shape" ? record_.shape : record_.offsets;
    refuse_unless(numbers.size() < 64, "has more numbers than any tensor", name_);
    numbers.push_back(value);
    return true;
  }
  bool number_integer(number_integer_t) override { return odd("a negative number"); }
  bool number_float(number_float_t, const string_t&) override { return odd("a number that is no whole 64-bit one"); }
  bool null() override { return odd("null"); }
  bool boolean(bool) override { return odd("true or false"); }
  bool binary(binary_t&) override { return odd("binary"); }
  bool parse_error(std::size_t at, const std::string&, const nlohmann::json::exception& error) override {
    shard::fail(Code::BadFormat, "{}: header, byte {}: {}", where_, at, error.what());
  }

 private:
  template <typename What>
  void refuse_unless(bool good, const char* problem, const What& what) {
    shard::require(good, Code::BadFormat, [&] { return fmt::format("{}: header: '{}' {}", where_, what, problem); });
  }
  bool odd(const char* what) {
    if (skip_ || (level_ == 2 && !in_array_ && name_ != "__metadata__" && field_ != "dtype" && field_ != "shape" && field_ != "data_offsets")) return true;
    shard::fail(Code::BadFormat, "{}: header: '{}' holds {} where none belongs", where_, name_, what);
  }
  bool skip() {
    skip_ = 1;
    return true;
  }
  bool deeper() {
    refuse_unless(++skip_ < 256, "is nested too deep", name_);
    return true;
  }
  bool shallower() {
    --skip_;
    return true;
  }

  void finish() {
    refuse_unless(record_.has_dtype && record_.has_shape && record_.offsets.size() == 2, "needs dtype, shape and two data_offsets", name_);
    Entry entry{name_, shard::DType::U8, {}, record_.offsets[0], record_.offsets[1]};
    const auto dtype = shard::dtype_named(record_.dtype);
    refuse_unless(dtype && safetensors_name(*dtype) == record_.dtype, ("has dtype '" + record_.dtype + "', which is not supported").c_str(), name_);
    entry.dtype = *dtype;
    for (const auto size : record_.shape) {
      refuse_unless(size <= INT64_MAX, "has a size beyond 63 bits", name_);
      entry.shape.push_back(static_cast<shard::Index>(size));
    }
    if (*dtype == shard::DType::F4E2M1x2) {  // two elements a byte; carried as bytes
      refuse_unless(!entry.shape.empty() && entry.shape.back() % 2 == 0, "has an odd number of 4-bit elements in a row", name_);
      entry.shape.back() /= 2;
    }
    std::uint64_t bytes = 0;
    bool fits = true;
    try {
      bytes = static_cast<std::uint64_t>(shard::volume(entry.shape));
    } catch (const shard::Error&) {
      fits = false;
    }
    refuse_unless(fits && !__builtin_mul_overflow(bytes, shard::size_of(entry.dtype), &bytes), "has more bytes than 64 bits count", name_);
    shard::require(entry.begin <= entry.end && entry.end - entry.begin == bytes, Code::BadFormat, [&] {
      return fmt::format("{}: header: '{}' has data_offsets [{}, {}]; its shape {} needs {} bytes", where_, name_, entry.begin, entry.end,
                         shard::to_string(entry.shape), bytes);
    });
    header.entries.push_back(std::move(entry));
  }

  std::string_view where_;
  int level_ = 0, skip_ = 0;
  bool in_array_ = false;
  std::string name_, field_;
  Record record_;
  std::set<std::string> names_, fields_;
};

void check_cover(const std::vector<Entry>& entries, std::uint64_t data_bytes, std::string_view where) {
  std::uint64_t at = 0;
  for (const auto& entry : entries) {
    shard::require(entry.begin == at, Code::BadFormat, [&] {
      return fmt::format("{}: '{}' starts at byte {}; should be {} ({})", where, entry.name, entry.begin, at, entry.begin < at ? "overlap" : "gap");
    });
    at = entry.end;
  }
  shard::require(at == data_bytes, Code::BadFormat, [&] { return fmt::format("{}: tensors end at data byte {}; the file holds {}", where, at, data_bytes); });
}

}  // namespace

Header parse_header(std::string_view json, std::uint64_t data_bytes, std::string_view where) {
  const auto first = json.find_first_not_of(" \t\n\r");
  shard::require(first != json.npos && json[first] == '{', Code::BadFormat, [&] { return fmt::format("{}: header is no JSON object", where); });
  Handler handler(where);
  nlohmann::json::sax_parse(json, &handler);
  auto& entries = handler.header.entries;
  std::stable_sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) { return a.begin != b.begin ? a.begin < b.begin : a.end < b.end; });
  check_cover(entries, data_bytes, where);
  return std::move(handler.header);
}

Header read_header(const File& file) {
  shard::require(file.size() >= 8, Code::BadFormat, [&] { return fmt::format("{}: {} bytes; a safetensors file has at least 8", file.name(), file.size()); });
  std::uint64_t length = 0;
  file.read(0, std::as_writable_bytes(std::span(&length, 1)));
  shard::require(length <= kMaxHeaderBytes && length <= file.size() - 8, Code::BadFormat,
                 [&] { return fmt::format("{}: header of {} bytes; the file has {}, the limit is {}", file.name(), length, file.size(), kMaxHeaderBytes); });
  auto header = parse_header(file.text(8, length), file.size() - 8 - length, file.name());
  header.data_offset = 8 + length;
  return header;
}

std::string write_header(std::span<const Entry> entries, const std::map<std::string, std::string>& metadata) {
  nlohmann::ordered_json json;
  if (!metadata.empty()) json["__metadata__"] = metadata;
  for (const auto& entry : entries) {
    auto shape = entry.shape;
    if (entry.dtype == shard::DType::F4E2M1x2) shape.back() *= 2;
    json[entry.name] = {{"dtype", safetensors_name(entry.dtype)}, {"shape", shape}, {"data_offsets", {entry.begin, entry.end}}};
  }
  auto text = json.is_null() ? std::string("{}") : json.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  const std::uint64_t length = text.size();
  std::string out(8, '\0');
  std::memcpy(out.data(), &length, 8);
  return out + text;
}

}  // namespace formats::safetensors
