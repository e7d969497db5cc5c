// A file with given bytes for the length of a test.
#pragma once

#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <string_view>

#include "formats/file.h"

class TemporaryFile {
 public:
  explicit TemporaryFile(std::string_view bytes) : path_(fresh_path()) { write(bytes); }
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;
  ~TemporaryFile() { std::filesystem::remove(path_); }
  void write(std::string_view bytes) const {
    std::ofstream(path_, std::ios::binary | std::ios::trunc)
        .write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  }
  formats::File open() const { return formats::File(path_); }

 private:
  static std::filesystem::path fresh_path() {
    static int number = 0;
    const auto name = "shardkit_test_" + std::to_string(getpid()) + "_" + std::to_string(number++);
    return std::filesystem::temp_directory_path() / name;
  }
  std::filesystem::path path_;
};

inline std::string test_data(std::string_view name) {
  std::ifstream file(std::filesystem::path(SHARDKIT_TEST_DATA) / name, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}
