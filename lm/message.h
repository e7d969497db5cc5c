// Values as bytes that another rank of the same program reads back in the same order. No format: both ends are one build on like machines.
#pragma once

#include "libshard/error.h"

#include <cstring>
#include <map>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

namespace lm {

class MessageWriter {
 public:
  template <typename... T>
  void operator()(const T&... values) {
    (add(values), ...);
  }
  const std::string& text() const { return text_; }

 private:
  template <typename T>
  void add(const T& value) {
    static_assert(std::is_trivially_copyable_v<T>);
    text_.append(reinterpret_cast<const char*>(&value), sizeof value);
  }
  void add(const std::string& value) {
    add(value.size());
    text_ += value;
  }
  template <typename T>
  void add(const std::vector<T>& values) {
    add(values.size());
    for (const auto& value : values) add(value);
  }
  template <typename K, typename V>
  void add(const std::map<K, V>& values) {
    add(values.size());
    for (const auto& [key, value] : values) add(key), add(value);
  }
  std::string text_;
};

/// Throws Io where a message ends early.
class MessageReader {
 public:
  explicit MessageReader(std::string_view text) : rest_(text) {}
  template <typename... T>
  void operator()(T&... values) {
    (get(values), ...);
  }

 private:
  std::string_view take(std::size_t bytes) {
    shard::require(bytes <= rest_.size(), shard::Code::Io, [] { return "ranks: a message ends early; do all run the same program?"; });
    const auto out = rest_.substr(0, bytes);
    rest_.remove_prefix(bytes);
    return out;
  }
  std::size_t count() {
    std::size_t out = 0;
    get(out);
    shard::require(out <= rest_.size(), shard::Code::Io, [] { return "ranks: a message ends early; do all run the same program?"; });
    return out;
  }
  template <typename T>
  void get(T& value) {
    static_assert(std::is_trivially_copyable_v<T>);
    std::memcpy(&value, take(sizeof value).data(), sizeof value);
  }
  void get(std::string& value) { value = take(count()); }
  template <typename T>
  void get(std::vector<T>& values) {
    values.resize(count());
    for (auto& value : values) get(value);
  }
  template <typename K, typename V>
  void get(std::map<K, V>& values) {
    for (auto left = count(); left > 0; --left) {
      K key{};
      get(key);
      get(values[key]);
    }
  }
  std::string_view rest_;
};

}  // namespace lm
